"""`halve bench quality`: how well models translate, and how much of the teacher's quality they keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import comet as comet_metric
from benchmarks import conditions, embedding, scoring, size
from benchmarks.config import QualityConfig
from benchmarks.earlier import begun_on, bring, check_earlier, origins, scorers
from benchmarks.translations import (
    TRANSLATING,
    Hypotheses,
    Model,
    Workload,
    check_models,
    named,
    translate_all,
)
from halve import environment
from halve.artefact import Artefact, Draft, read, writing
from halve.errors import InputError
from halve.json_files import write_json
from halve.progress import SILENT, Progress


def run_quality(
    config: QualityConfig,
    teacher: str | Path,
    students: Sequence[str | Path],
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    earlier: Sequence[Path] = (),
) -> Artefact:
    """Scores a teacher and its students or packages on one split.

    Writes `quality.json`, and beside it the lines it scored (`ids.txt`, `sources.txt`,
    `references.txt`, `hypotheses/NAME.txt`), from which `scoring.recompute` gets the same scores.
    A killed run goes on with the segments that were not yet translated.

    Args:
        earlier: results that have translated some of these models already, which are not asked again.

    Raises:
        CorpusError: no such split, or no reference in the language.
        ArtefactError: a path is no model.
        InputError: a COMET checkpoint or an embedding model that is named and not there; an earlier result made otherwise.
    """
    check_config(config)
    workload = Workload.of(config, corpus)
    _warn_of_comet(config, workload, progress)
    models = named([teacher, *students])
    check_models(config, models, workload)
    sizes = [size.measure(model.path, model.given) for model in models]
    if config.threads:
        environment.pin_threads(config.threads)
    roles = ["teacher", *["student"] * len(students)]
    parents = {
        f"{role} {model.name}": model.path for role, model in zip(roles, models, strict=True)
    }
    parents |= {"corpus": corpus} | scorers(config)
    known = {place: check_earlier(place, config, models, corpus) for place in earlier}
    settings = config.recorded()
    # Translations are kept by their model's contents: they outlive a change of students, too.
    needs = (TRANSLATING, {"corpus"})
    with writing(out, "results", settings, config.seed, parents, work_needs=needs) as draft:
        begun = begun_on(draft.work, progress)
        bring(config, models, workload, draft.work, out, known, progress)
        found = translate_all(config, models, workload, draft, progress)
        result = _result(config, models, sizes, workload, found, draft, progress)
        draft.extra.update(bench="quality", lang=config.lang, split=config.split)
        if taken := origins(models, draft.work):
            draft.extra["taken_over"] = taken
        if begun:
            draft.extra["begun_on"] = begun
        write_json(draft.path / scoring.RESULT, result)
    return read(out)


def check_config(config: QualityConfig) -> None:
    """Refuses what is named and not there, before hours of translating.

    Raises:
        InputError: a COMET checkpoint, its interpreter or an embedding model that does not exist, or one that embeds nothing.
    """
    paths = {
        "COMET checkpoint": (config.comet_checkpoint, "--comet-checkpoint"),
        "COMET interpreter": (config.comet_python, "--comet-python"),
        "embedding model": (config.embedding_model, "--embedding-model"),
    }
    for what, (path, option) in paths.items():
        if path is not None and not Path(path).exists():
            raise InputError(
                f"The {what} {path} does not exist",
                mend=f"correct the path, or leave {option} (in a recipe, "
                f"{option[2:].replace('-', '_')}) out",
            )
    if config.embedding_model is not None:
        embedding.check(config.embedding_model)


def _warn_of_comet(config: QualityConfig, workload: Workload, progress: Progress) -> None:
    """Says before hours of translating what COMET lacks: it can still be had."""
    if config.comet_checkpoint is None:
        return
    sources = [segment.source_text for segment in workload.segments]
    if missing := comet_metric.what_is_missing(
        config.comet_checkpoint, config.comet_python, sources
    ):
        progress.warn(
            f"COMET will not be measured: {missing}. Mended later, the same command measures it, and it alone."
        )


def _result(
    config: QualityConfig,
    models: Sequence[Model],
    sizes: Sequence[size.Size],
    workload: Workload,
    found: dict[str, Hypotheses],
    draft: Draft,
    progress: Progress,
) -> dict[str, Any]:
    """The object that the bench prints; writes the lines it was computed from."""
    _write_lines(draft.path, workload, found)
    comet = comet_metric.measure(
        config.comet_checkpoint,
        config.comet_python,
        {model.name: found[model.name].texts for model in models},
        [scoring.one_line(segment.source_text) for segment in workload.segments],
        workload.references,
        batch_size=config.comet_batch_size,
        progress=progress,
    )
    similar = embedding.measure(
        config.embedding_model,
        {model.name: found[model.name].texts for model in models},
        workload.references,
        progress=progress,
    )
    means: dict[str, comet_metric.Comet | embedding.Similarity]
    means = {"comet": comet, embedding.METRIC: similar}
    for metric, measured in means.items():
        for name, scores in measured.scores.items():
            scoring.write_lines(draft.path / metric / f"{name}.txt", [f"{s:.6f}" for s in scores])
    entries = []
    for model, bytes_of in zip(models, sizes, strict=True):
        progress.message(f"score: {model.name}")
        entries.append(_entry(config, model, bytes_of, workload, found, means, models[0].name))
    return {
        "bench": "quality",
        "lang": config.lang,
        "split": config.split,
        "segments": len(workload.segments),
        "segments_in_split": workload.in_split,
        "subset": len(workload.segments) < workload.in_split,
        "beams": config.beams,
        "resamples": config.resamples,
        "seed": config.seed,
        "comet": comet.record(),
        "versions": environment.versions(),
        "teacher": entries[0],
        "students": entries[1:],
    }


def _write_lines(path: Path, workload: Workload, found: dict[str, Hypotheses]) -> None:
    segments = workload.segments
    scoring.write_lines(path / "ids.txt", [segment.id for segment in segments])
    scoring.write_lines(path / "sources.txt", [segment.source_text for segment in segments])
    scoring.write_lines(path / "references.txt", workload.references)
    for name, hypotheses in found.items():
        scoring.write_lines(path / "hypotheses" / f"{name}.txt", hypotheses.texts)
    if heard := conditions.voices(workload.corpus, segments):
        scoring.write_lines(path / conditions.VOICES, heard)
    write_json(path / "stopped.json", {name: found[name].stopped for name in found})


def _controls_of(found: dict[str, Hypotheses], teacher: str) -> list[str]:
    return [control for control in scoring.CONTROLS if f"{teacher}.{control}" in found]


def _entry(
    config: QualityConfig,
    model: Model,
    measured: size.Size,
    workload: Workload,
    found: dict[str, Hypotheses],
    means: Mapping[str, comet_metric.Comet | embedding.Similarity],
    teacher: str,
) -> dict[str, Any]:
    texts, references = found[model.name].texts, workload.references
    entry: dict[str, Any] = {"name": model.name, **measured.record()}
    entry["scores"] = scoring.score_all(texts, references, config.lang)
    entry["behaviour"] = scoring.behaviour(texts, references, found[model.name].stopped)
    for metric, mean in means.items():
        if mean.scores:
            of_model = mean.scores[model.name]
            value = round(sum(of_model) / len(of_model), 6)
            entry["scores"][metric] = {"score": value, "signature": mean.signature}
    entry |= _conditions(config, model.name, workload, found, teacher)
    if model.name == teacher:
        entry["controls"] = {
            control: {
                metric: score["score"]
                for metric, score in scoring.score_all(
                    found[f"{teacher}.{control}"].texts, references, config.lang
                ).items()
            }
            for control in _controls_of(found, teacher)
        }
        return entry
    drawn = {"resamples": config.resamples, "seed": config.seed}
    entry["retention"] = scoring.retention_all(
        found[teacher].texts, texts, references, config.lang, **drawn
    )
    for metric, mean in means.items():
        if mean.scores:
            entry["retention"][metric] = scoring.mean_retention(
                mean.scores[teacher], mean.scores[model.name], **drawn
            )
    return entry


def _conditions(
    config: QualityConfig,
    name: str,
    workload: Workload,
    found: dict[str, Hypotheses],
    teacher: str,
) -> dict[str, Any]:
    """Scores by voice and with noise, where the corpus and the settings have them."""
    entry: dict[str, Any] = {}
    texts, references = found[name].texts, workload.references
    if heard := conditions.voices(workload.corpus, workload.segments):
        entry["by_voice"] = conditions.by_voice(texts, references, heard, config.lang)
    if config.noise_db is not None and f"{name}.{conditions.NOISE}" in found:
        # A teacher that reads hears no noise.
        of_teacher = None if name == teacher else found.get(f"{teacher}.{conditions.NOISE}")
        entry["noisy"] = conditions.noisy_entry(
            found[f"{name}.{conditions.NOISE}"].texts,
            None if of_teacher is None else of_teacher.texts,
            references,
            config.lang,
            config.noise_db,
            {"resamples": config.resamples, "seed": config.seed},
        )
    return entry
