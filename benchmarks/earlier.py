"""Translations of finished quality results, taken over: where only scores are to be completed, or other students join."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import scoring
from benchmarks.comet import could_measure
from benchmarks.conditions import NOISE
from benchmarks.config import QualityConfig
from halve import artefact, environment
from halve.errors import ArtefactError, InputError
from halve.json_files import append_jsonl, read_json

SCORING_ALONE = frozenset(
    {"comet_checkpoint", "comet_python", "comet_batch_size", "embedding_model", "resamples", "seed"}
)
"""Settings that change no translation."""
SCORERS = ("comet checkpoint", "embedding model")
"""The names of the models that score, among a result's inputs."""


def scorers(config: QualityConfig) -> dict[str, Path]:
    """The models that score, by the names that they have on record."""
    given = (config.comet_checkpoint, config.embedding_model)
    return {name: Path(path) for name, path in zip(SCORERS, given, strict=True) if path}


def lacks_comet(config: QualityConfig, result: Path) -> bool:
    """Whether a result has no COMET that was asked for and could be measured by now."""
    sources = scoring.read_lines(result / "sources.txt")
    if not could_measure(config.comet_checkpoint, config.comet_python, sources):
        return False
    comet = read_json(result / scoring.RESULT).get("comet", {})
    # A worker that failed is asked again: only itself is run, nothing is translated.
    return not comet.get("measured")


def has_translations(out: Path, config: QualityConfig, parents: Mapping[str, Path]) -> bool:
    """Whether a finished result's texts are those that this run would make, however they are to be scored now.

    Args:
        parents: what is translated, and by which models.
    """
    if not (out / artefact.RECORD).is_file():
        return False
    made = artefact.read(out)
    if made.kind != "results" or made.extra.get("bench") != "quality":
        return False
    known = {name: found for name, found in made.parents.items() if name not in SCORERS}
    wanted = {name: artefact.identity(path) for name, path in parents.items()}
    same_code = made.versions.get("halve") == environment.versions().get("halve")
    return same_code and known == wanted and not config.differs_from(made.recipe, SCORING_ALONE)


def check_earlier(
    result: Path, config: QualityConfig, models: Mapping[str, Path], corpus: Path
) -> dict[str, str]:
    """Which of a run's models an earlier result has translated already, as this run would.

    Args:
        models: the run's, by name.

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
    known = {
        identity: name.partition(" ")[2]
        for name, identity in made.parents.items()
        if name.startswith(("teacher ", "student "))
    }
    mine = {name: artefact.identity(path) for name, path in models.items()}
    found = {name: known[identity] for name, identity in mine.items() if identity in known}
    if not found:
        raise InputError(
            f"{result} has translations of {', '.join(sorted(known.values()))}, none of them a model of this run",
            mend="leave --earlier out",
        )
    return found


def _made_otherwise(made: artefact.Artefact, config: QualityConfig, corpus: Path) -> str:
    """In what a result differs from one that this run would make of the same models; empty where it does not."""
    version, here = made.versions.get("halve"), environment.versions().get("halve")
    if version != here:
        return f"by halve {version}, which is {here} here"
    if made.parents.get("corpus") != artefact.identity(corpus):
        return "of another corpus"
    settings = config.differing(made.recipe, SCORING_ALONE | {"controls"})
    now = config.model_dump(mode="json")
    return ", ".join(
        f"with {name} {value}, which is {now[name]} here" for name, value in settings.items()
    )


def take_over(
    result: Path,
    names: Mapping[str, str],
    work: Path,
    chunks: Sequence[Sequence[int]],
    ids: Sequence[str],
) -> None:
    """Writes a result's translations as a run's finished chunks, of models that have none yet.

    Args:
        names: what the result calls the run's models, by the run's names.
        work: where a quality run keeps its chunks.
        chunks: the segments' places in each chunk.
        ids: of the segments, which must be the result's.
    """
    if scoring.read_lines(result / "ids.txt") != list(ids):
        return
    stopped = read_json(result / "stopped.json")
    for own, name in names.items():
        for end in ("", *(f".{what}" for what in (*scoring.CONTROLS, NOISE))):
            file = result / "hypotheses" / f"{name}{end}.txt"
            store = work / f"{own}{end}.jsonl"
            if store.exists() or not file.is_file():
                continue
            texts, reasons = scoring.read_lines(file), stopped.get(file.stem, {})
            for number, chunk in enumerate(chunks):
                rows = [[index, texts[index], reasons.get(ids[index], "end")] for index in chunk]
                append_jsonl(store, {"chunk": number, "rows": rows})
