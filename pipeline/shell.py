"""What all commands share: where results go, running a step, arguments, and how failures end."""

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from halve import artefact, environment
from halve.config import Config
from halve.errors import ArtefactError, InputError
from halve.json_files import read_json
from pipeline import console, failures, steps
from pipeline.console import Result
from pipeline.steps import Step


def demo_corpus() -> Path:
    """The corpus that the repository carries."""
    return Path(__file__).resolve().parent.parent / "demo" / "corpus"


def place(out: Path | None, stage: str, config: Config, *inputs: Any) -> Path:
    """--out, or a folder under runs/ that the same command finds again."""
    if out is not None:
        return out
    facts = [config.recorded(), [str(Path(str(item)).absolute()) for item in inputs]]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return environment.runs_dir() / f"{stage}-{key}"


def keep_apart(place: Path, recipe: Path, looks_only: bool) -> None:
    """Refuses the default folder of a run where another recipe of the same name has filled it.

    Raises:
        InputError: it has, and is still there.
    """
    note = place / ".recipe"
    own = os.path.relpath(recipe.resolve(), place.resolve())
    known = note.read_text(encoding="utf8").strip() if note.is_file() else own
    if known != own and (place / known).is_file():
        raise InputError(
            f"{place} holds the run of another recipe, {os.path.normpath(place / known)}",
            mend="name another place with --out",
        )
    if not looks_only:
        place.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{own}\n", encoding="utf8")


def do(step: Step) -> Result:
    """Carries out a step, and says what it made."""
    made, ran = steps.carry_out(step, console.progress())
    data = {"path": str(made.path), "kind": made.kind, "fingerprint": made.fingerprint, "ran": ran}
    facts = {key: value for key, value in made.extra.items() if key not in data}
    lines = [
        f"{made.kind}: {made.path}",
        *(f"  {key}: {_fact(value)}" for key, value in facts.items()),
    ]
    return Result("\n".join(lines), data | facts)


def _fact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def bench(step: Step, name: str) -> Result:
    """Carries out a bench; its result is the object that it wrote to the file `name`."""
    made, _ = steps.carry_out(step, console.progress())
    data = json.loads((made.path / name).read_text(encoding="utf8"))
    from pipeline.summary import of_bench

    return of_bench(made, data)


def language_of(model: Path) -> str:
    """The language that a model was made for, from its package, its record, or its ancestors' settings."""
    manifest = model / "package.json"
    if manifest.is_file():
        facts = read_json(manifest)
        try:
            return str(facts["languages"][0])
        except (KeyError, IndexError, TypeError):
            raise ArtefactError(
                f"{manifest} names no languages",
                expected="what `halve package` wrote",
                mend="make the package again",
            ) from None
    if langs := artefact.languages_of(model):
        return langs[0]
    raise InputError(
        "Which language?", expected="--lang: the model does not say what it was made for"
    )


# Options that take several values, as `--students A B` or as `--students A --students B`.
_LISTS = {
    ("bench", "quality"): ("--students", "--earlier"),
    ("bench", "longform"): ("--hypothesis",),
    ("bench", "latency"): ("--models", "--peers", "--also-threads"),
    ("serve",): ("--model",),
    ("prune",): ("--layers",),
    ("merge",): ("--adapter",),
    ("teach",): ("--lang",),
    ("tune",): ("--lang",),
    ("distill",): ("--lang",),
    ("package",): ("--lang", "--vocab-texts"),
}


def spread_lists(arguments: Sequence[str]) -> list[str]:
    """Repeats an option in front of each further value that follows it."""
    words = tuple(word for word in arguments if not word.startswith("-"))
    lists = next((found for key, found in _LISTS.items() if words[: len(key)] == key), ())
    spread: list[str] = []
    current = ""
    for word in arguments:
        if word.startswith("-"):
            current = word if word in lists else ""
        elif current and spread[-1] != current:
            spread.append(current)
        spread.append(word)
    return spread


# typer keeps the class of wrong usage in a private module; this public one is a subclass of it.
_UsageError: Any = typer.BadParameter.__mro__[1]


def run(app: typer.Typer, arguments: Sequence[str]) -> None:
    """Runs a command and exits with its code: every failure becomes one line."""
    given = list(arguments)
    debug = "--debug" in given
    _quieten(debug)
    _open_streams()
    try:
        code = app(args=spread_lists(given), prog_name="halve", standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error.ctx.get_help()}\n")
            sys.exit(2)
        _complain(f"{_usage(error)} See `{_help_for(error)}`.", error, debug)
        code = 2
    except typer.Exit as stop:
        code = stop.exit_code
    except (Exception, KeyboardInterrupt, typer.Abort) as error:
        failure = failures.explain(_behind(error), resumes="translate" not in given[:1])
        _complain(failure.message, error, debug)
        code = failure.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _behind(error: BaseException) -> BaseException:
    """What typer's Abort stands for: Ctrl-C, or a file that ended too early."""
    if not isinstance(error, typer.Abort):
        return error
    if not isinstance(error.__cause__, EOFError):
        return KeyboardInterrupt()
    return InputError(
        "A file ends before what it should hold",
        mend="copy or make it again (--debug shows where it was read)",
    )


def _open_streams() -> None:
    """Streams that the caller closed lead nowhere; what is no terminal takes UTF-8, whatever the locale."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


def _usage(error: Any) -> str:
    """What typer says of wrong usage, as a sentence and without the name of pydantic's exception."""
    # The choices of a missing option come on lines of their own.
    text = " ".join(str(error.format_message()).replace(": Value error, ", ": ").split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _help_for(error: Any) -> str:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "halve"
    return f"{path} --help"


def _complain(message: str, error: BaseException, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if message:
        with contextlib.suppress(OSError):  # nobody reads it
            sys.stderr.write(f"Error: {message}\n")


def _quieten(debug: bool) -> None:
    """Libraries' chatter would bury the one line that matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
