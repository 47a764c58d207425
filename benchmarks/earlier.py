"""Translations of finished quality results, taken over: where only scores are to be completed, or other students join."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import scoring
from benchmarks.conditions import NOISE
from benchmarks.config import QualityConfig
from benchmarks.translations import Model, Workload, read_store, store_of
from halve import artefact, environment
from halve.artefact import Artefact
from halve.errors import ArtefactError, InputError
from halve.json_files import append_jsonl, read_json, read_jsonl, write_json
from halve.progress import Progress

SCORING_ALONE = frozenset(
    {"comet_checkpoint", "comet_python", "comet_batch_size", "embedding_model", "resamples", "seed"}
)
"""Settings that change no translation."""
SCORERS = ("comet checkpoint", "embedding model")
"""The names of the models that score, among a result's inputs."""
_ADDS = frozenset({"controls", "noise_db"})
"""Settings that add translations and change none."""
_ORIGINS = "taken_over.json"
"""In the resume state: what other results the texts there are from, by the models' contents."""
_PLACES = "begun_on.jsonl"
"""In the resume state: where the run was begun, and where it went on."""
_RUNTIMES = ("torch", "transformers", "onnxruntime", "llama-cpp-python")


def scorers(config: QualityConfig) -> dict[str, Path]:
    """The models that score, by the names that they have on record."""
    given = (config.comet_checkpoint, config.embedding_model)
    return {name: Path(path) for name, path in zip(SCORERS, given, strict=True) if path}


def bring(
    config: QualityConfig,
    models: Sequence[Model],
    workload: Workload,
    work: Path,
    out: Path,
    earlier: Mapping[Path, Mapping[str, str]],
    progress: Progress,
) -> None:
    """Takes over what a finished result in `out`, and earlier ones, have translated as this run would.

    Args:
        work: the resume state, where finished chunks are kept.
        earlier: what `check_earlier` said of each.
    """
    for result, names in {
        out: _in_place(config, models, workload, out, progress),
        **earlier,
    }.items():
        if not names:
            continue
        if result != out:
            progress.message(f"{', '.join(names)}: as translated in {result}")
        _warn_of_elsewhere(result, progress)
        for model in models:
            if model.name in names and _take_over(
                config, result, names[model.name], model, workload, work
            ):
                _note_origin(result, names[model.name], model, work, is_own=result == out)


def origins(models: Sequence[Model], work: Path) -> dict[str, Any]:
    """Which models' translations are another result's, with that result's hash and versions: by name."""
    path = work / _ORIGINS
    known = read_json(path) if path.is_file() else {}
    return {model.name: known[model.key] for model in models if model.key in known}


def check_earlier(
    result: Path, config: QualityConfig, models: Sequence[Model], corpus: Path
) -> dict[str, str]:
    """Which of a run's models an earlier result has translated already, as this run would.

    Returns:
        the result's names by the run's.

    Raises:
        ArtefactError: no quality result, or one whose files are not what they were.
        InputError: it was made otherwise, of another corpus, or of none of these models.
    """
    made = artefact.read(result, "results")
    if made.extra.get("bench") != "quality":
        raise ArtefactError(
            f"{result} is a result of `halve bench {made.extra.get('bench', '?')}`",
            expected="one of `halve bench quality`",
        )
    if faults := artefact.verify(result):
        raise ArtefactError(
            f"{result}: {'; '.join(faults[:3])}", mend="leave it out, or put its files back"
        )
    if why := _made_otherwise(made, config, corpus):
        raise InputError(
            f"{result} was made {why}: what its models say there is not what they would say here",
            expected="a result of the same corpus, settings and version of halve",
            mend="measure with those settings, or leave --earlier out",
        )
    found = _shared(made, models)
    if not found:
        names = ", ".join(sorted(_translated(made).values()))
        raise InputError(
            f"{result} has translations of {names or 'models that its record does not name'}, none of them a model of this run",
            mend="leave --earlier out",
        )
    return found


def _in_place(
    config: QualityConfig,
    models: Sequence[Model],
    workload: Workload,
    out: Path,
    progress: Progress,
) -> dict[str, str]:
    """The models that a finished result has translated which this run will replace, if it is one."""
    if not (out / artefact.RECORD).is_file():
        return {}
    made = artefact.read(out)
    if made.kind != "results" or made.extra.get("bench") != "quality":
        return {}
    if _made_otherwise(made, config, workload.corpus.path):
        return {}
    if faults := artefact.verify(out):
        progress.warn(f"{out} is translated anew: {'; '.join(faults[:3])}")
        return {}
    return _shared(made, models)


def _translated(made: Artefact) -> dict[str, str]:
    """A result's models by their contents."""
    roles = ("teacher ", "student ")
    # Records of before version 0.2 name models without their roles.
    others = {"corpus", *SCORERS}
    return {
        identity: name.partition(" ")[2] if name.startswith(roles) else name
        for name, identity in made.parents.items()
        if name not in others
    }


def _shared(made: Artefact, models: Sequence[Model]) -> dict[str, str]:
    known = _translated(made)
    mine = {model.name: artefact.identity(model.path) for model in models}
    return {name: known[identity] for name, identity in mine.items() if identity in known}


def _made_otherwise(made: Artefact, config: QualityConfig, corpus: Path) -> str:
    """In what a result differs from one that this run would make of the same models; empty where it does not."""
    version, here = made.versions.get("halve"), environment.versions().get("halve")
    if version != here:
        return f"by halve {version}, which is {here} here"
    if made.parents.get("corpus") != artefact.identity(corpus):
        return "of another corpus"
    settings = config.differing(made.recipe, SCORING_ALONE | _ADDS)
    now = config.model_dump(mode="json")
    return ", ".join(
        f"with {name} {value}, which is {now[name]} here" for name, value in settings.items()
    )


def _made_on(result: Path) -> dict[str, Any]:
    """The runtimes that translated a result, the processor's instruction sets, and the GPU if they had one."""
    known = artefact.read(result).versions
    found: dict[str, Any] = {name: known[name] for name in _RUNTIMES if known.get(name)}
    timings = result / artefact.TIMINGS
    lines = read_jsonl(timings) if timings.is_file() else []
    stages = [line for line in lines if line.get("event") == "stage"]
    last = stages[-1] if stages else {}
    return found | {key: last[key] for key in ("instructions", "gpu") if last.get(key)}


def _here() -> dict[str, Any]:
    """What `_made_on` would say of a result that is made here and now."""
    import torch

    known = environment.versions()
    found: dict[str, Any] = {name: known[name] for name in _RUNTIMES if known.get(name)}
    found["instructions"] = list(environment.instructions())
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def begun_on(work: Path, progress: Progress) -> list[dict[str, Any]]:
    """Where else a run was begun that goes on here: its versions, instruction sets and GPU, the first first."""
    path, here = work / _PLACES, _here()
    known = read_jsonl(path)
    others = [place for place in known if place != here]
    if others:
        progress.warn(
            "This run was begun with other versions or on another processor or GPU: texts may differ where two tokens are all "
            "but equally likely. Both are on record."
        )
    if not known or known[-1] != here:
        append_jsonl(path, here)
    return others


def _elsewhere(result: Path) -> list[str]:
    """In what a result's making differs from what would make it here, in words."""
    there, here = _made_on(result), _here()
    others = [
        f"{name} {there[name]} (here {here[name]})"
        for name in _RUNTIMES
        if name in there and name in here and there[name] != here[name]
    ]
    if there.get("gpu") != here.get("gpu"):
        others.append(f"{there.get('gpu', 'no GPU')} (here {here.get('gpu', 'none')})")
    sets, own = there.get("instructions"), here["instructions"]
    if sets and sets != own:  # not on record before version 0.2
        others.append(f"a processor with {' '.join(sets)} (here {' '.join(own) or 'none'})")
    return others


def _warn_of_elsewhere(result: Path, progress: Progress) -> None:
    if others := _elsewhere(result):
        progress.warn(
            f"{result} was made with {', '.join(others)}: its texts may differ where two tokens are all but equally likely"
        )


def _take_over(
    config: QualityConfig,
    result: Path,
    name: str,
    model: Model,
    workload: Workload,
    work: Path,
) -> bool:
    """Writes a result's translations as a run's finished chunks, those that it lacks; says whether it lacked any of the plain ones."""
    if scoring.read_lines(result / "ids.txt") != workload.ids:
        return False
    stopped = read_json(result / "stopped.json")
    noise_db = artefact.read(result).recipe.get("noise_db")
    took = False
    for condition in ("", *scoring.CONTROLS, NOISE):
        stem = f"{name}.{condition}" if condition else name
        file = result / "hypotheses" / f"{stem}.txt"
        if not file.is_file() or (condition == NOISE and noise_db != config.noise_db):
            continue
        store = store_of(work, model, condition, noise_db)
        done = read_store(store)
        texts, reasons = scoring.read_lines(file), stopped.get(stem, {})
        for number, chunk in enumerate(workload.chunks):
            if number not in done:
                rows = [
                    [index, texts[index], reasons.get(workload.segments[index].id, "end")]
                    for index in chunk
                ]
                append_jsonl(store, {"chunk": number, "rows": rows})
                took |= not condition
    return took


def _note_origin(result: Path, name: str, model: Model, work: Path, is_own: bool) -> None:
    """Keeps on record whose texts they are: of a result that is made again, what it said itself, and where it
    was made if that was not here."""
    earlier = artefact.read(result).extra.get("taken_over", {}).get(name)
    if is_own and earlier is None and not _elsewhere(result):
        return
    path = work / _ORIGINS
    known = read_json(path) if path.is_file() else {}
    first = {"result": artefact.identity(result), **_made_on(result)}
    write_json(path, known | {model.key: earlier or first})
