"""`halve bench longform`: scores of a whole recording's translation against references by segment.

A system that hears a talk in one piece cuts it where it likes. Its text is cut anew where its words lie
closest to the references' (mwerSegmenter: Matusov et al. 2005), as IWSLT's evaluations do, and then scored
segment by segment like any other.
"""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks import scoring
from benchmarks.config import LongformConfig
from benchmarks.tables import METRIC_TITLES, Table
from halve import environment
from halve.artefact import Artefact, read, writing
from halve.errors import HalveError, InputError, MissingExtraError
from halve.importers.base import split_lines
from halve.json_files import write_json
from halve.languages import language
from halve.metrics import METRICS

RESULT = "longform.json"
_WORKER = """
import json, sys
from mweralign import align_texts
found = align_texts(*json.load(sys.stdin)).split("\\n")
print()
print(json.dumps([len(line.split()) for line in found]))
"""
_WORD = re.compile(r"\S+")
_CJK = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"
_CHARACTER = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
"""A CJK character or mark by itself, other scripts by words."""
_THAI = re.compile(r"\S")


def run_longform(
    config: LongformConfig, hypotheses: Sequence[Path], references: Path, out: Path
) -> Artefact:
    """Cuts texts to fit the references and scores them; the first is what the others are compared with.

    Writes `longform.json`, `references.txt` and `hypotheses/NAME.txt`, one segment a line.

    Args:
        hypotheses: text files, each a translation of the whole recording; how it is cut into lines says nothing.
        references: a text file with one segment a line.

    Raises:
        InputError: a file that is missing, empty or no UTF-8 text.
        MissingExtraError: mweralign is not installed.
    """
    lang = language(config.lang).code
    wanted = [scoring.one_line(line) for line in split_lines(_read(references))]
    if empty := [number for number, line in enumerate(wanted, start=1) if not line]:
        raise InputError(
            f"{references} has no text in line {empty[0]} ({len(empty)} such lines)",
            expected="the reference of one segment a line",
        )
    names = _names(hypotheses)
    texts = {name: _read(path) for name, path in names.items()}
    parents = {"references": references}
    # All others are measured against the first.
    parents |= {
        f"{'text' if place else 'first'} {name}": path
        for place, (name, path) in enumerate(names.items())
    }
    with writing(out, "results", config.recorded(), config.seed, parents) as draft:
        cut = {name: resegment(text, wanted, lang) for name, text in texts.items()}
        (draft.path / "hypotheses").mkdir(exist_ok=True)
        shown = {"references": wanted} | {f"hypotheses/{name}": each for name, each in cut.items()}
        for name, lines in shown.items():
            text = "".join(f"{line}\n" for line in lines)
            (draft.path / f"{name}.txt").write_text(text, encoding="utf8")
        write_json(draft.path / RESULT, _result(config, lang, cut, wanted))
        draft.extra.update(bench="longform", lang=lang)
    return read(out)


def resegment(hypothesis: str, references: Sequence[str], lang: str) -> list[str]:
    """The text cut into as many pieces as there are references, each of them on one line.

    All of the text stays, in its order; a piece may be empty.

    Raises:
        MissingExtraError: mweralign is not installed.
        HalveError: the aligner lost or made up words.
    """
    text = scoring.one_line(hypothesis)
    spans = [match.span() for match in _tokens(text, lang)]
    if not spans:
        return [""] * len(references)
    # Words as numbers: the aligner takes some characters for its own marks.
    numbers: dict[str, str] = {}

    def numbered(line: str) -> str:
        words = (match.group().casefold() for match in _tokens(line, lang))
        return " ".join(numbers.setdefault(word, f"w{len(numbers)}") for word in words)

    counts = _align("\n".join(map(numbered, references)), numbered(text))
    counts = [*counts, *[0] * len(references)][: len(references)]  # its last line may be missing
    ends = list(accumulate(counts))
    if ends[-1] != len(spans):
        raise HalveError(f"mweralign gave back {ends[-1]} of {len(spans)} words")
    pieces = []
    for first, after in zip([0, *ends], ends, strict=False):
        pieces.append(text[spans[first][0] : spans[after - 1][1]] if after > first else "")
    return pieces


def _align(references: str, hypothesis: str) -> list[int]:
    """How many words of the hypothesis go to each line of the references.

    In a process of its own: the aligner writes to the terminal, and may crash.
    """
    if importlib.util.find_spec("mweralign") is None:
        raise MissingExtraError("mweralign", "longform")
    given = json.dumps([references, hypothesis])
    done = subprocess.run(
        [sys.executable, "-c", _WORKER], input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise HalveError(f"mweralign failed: {said[-1]}")
    counts: list[int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def _tokens(text: str, lang: str) -> Any:
    if language(lang).joiner:
        return _WORD.finditer(text)
    return (_THAI if lang == "th" else _CHARACTER).finditer(text)


def _result(
    config: LongformConfig, lang: str, cut: dict[str, list[str]], references: list[str]
) -> dict[str, Any]:
    first = next(iter(cut))
    metric = language(lang).selection_metric
    systems = []
    for name, lines in cut.items():
        found: dict[str, Any] = {
            "name": name,
            "scores": scoring.score_all(lines, references, lang),
            "behaviour": _behaviour(lines, references),
        }
        if name != first:
            found["retention"] = scoring.retention_all(
                cut[first],
                lines,
                references,
                lang,
                resamples=config.resamples,
                seed=config.seed,
            )
        systems.append(found)
    return {
        "bench": "longform",
        "lang": lang,
        "metric": metric,
        "segments": len(references),
        "systems": systems,
        "aligner": {"name": "mweralign", "unit": "word" if language(lang).joiner else "character"},
        "machine": environment.machine(),
        "versions": environment.versions(),
    }


def _behaviour(lines: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Without the shares that only a translator knows: a text does not say why it ends."""
    found = scoring.behaviour(lines, references, {})
    return {name: share for name, share in found.items() if name not in ("cut_at_limit", "loops")}


def longform_table(result: Mapping[str, Any]) -> Table:
    """Each text's scores, and what it keeps of the first's."""
    rows = []
    for system in result["systems"]:
        kept = system.get("retention", {}).get(result["metric"])
        retained = scoring.kept_text(kept)
        scores = [f"{system['scores'][metric]['score']:.2f}" for metric in METRICS]
        rows.append([system["name"], *scores, retained])
    title = METRIC_TITLES[result["metric"]]
    first = result["systems"][0]["name"]
    return Table(
        f"{language(result['lang']).name}: {result['segments']} segments",
        ["text", *(METRIC_TITLES[metric] for metric in METRICS), f"% of {first}'s {title} (95 %)"],
        rows,
        note="Texts were cut to fit the references' segments by mweralign. Signatures: "
        + "; ".join(result["systems"][0]["scores"][metric]["signature"] for metric in METRICS)
        + ".",
    )


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    names: dict[str, Path] = {}
    for path in paths:
        name, number = path.stem, 2
        while name in names or name == "references":
            name, number = f"{path.stem}-{number}", number + 1
        names[name] = path
    return names


def _read(path: Path) -> str:
    try:
        # Not in text mode, which takes a carriage return inside a line for its end.
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error})", expected="a UTF-8 text file") from None
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text
