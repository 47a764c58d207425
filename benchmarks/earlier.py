"""Translations of a finished quality result, taken over where only its scores are to be completed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import scoring
from benchmarks.comet import could_measure
from benchmarks.config import QualityConfig
from halve import artefact, environment
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


def take_over(
    result: Path, work: Path, chunks: Sequence[Sequence[int]], ids: Sequence[str]
) -> None:
    """Writes a result's translations as a run's finished chunks, of models that have none yet.

    Args:
        work: where a quality run keeps its chunks.
        chunks: the segments' places in each chunk.
        ids: of the segments, which must be the result's.
    """
    if scoring.read_lines(result / "ids.txt") != list(ids):
        return
    stopped = read_json(result / "stopped.json")
    for file in sorted((result / "hypotheses").glob("*.txt")):
        store = work / f"{file.stem}.jsonl"
        if store.exists():
            continue
        texts, reasons = scoring.read_lines(file), stopped.get(file.stem, {})
        for number, chunk in enumerate(chunks):
            rows = [[index, texts[index], reasons.get(ids[index], "end")] for index in chunk]
            append_jsonl(store, {"chunk": number, "rows": rows})
