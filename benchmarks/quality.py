"""`halve bench quality`: how well models translate, and how much of the teacher's quality they keep."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import comet as comet_metric
from benchmarks import conditions, embedding, scoring, size
from benchmarks.config import QualityConfig
from benchmarks.earlier import (
    SCORING_ALONE,
    check_earlier,
    has_translations,
    scorers,
    take_over,
)
from benchmarks.heard import Heard, read_all
from benchmarks.workload import shuffled_partners, silence_like
from export.runtime import open_translator
from halve import environment
from halve.artefact import Artefact, Draft, identity, read, writing
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import InputError
from halve.families import Source
from halve.json_files import append_jsonl, read_jsonl, write_json
from halve.models import family_of, resolve_model
from halve.progress import SILENT, Progress
from halve.sources import read_source, segment_limit
from halve.translate import Translation, Translator, is_looping

_CHUNK_BATCHES = 4
"""Batches between two points that a killed run can go on from."""


@dataclass(frozen=True)
class _Model:
    name: str
    given: str
    path: Path


@dataclass(frozen=True)
class _Workload:
    """The segments in corpus order, and what the corpus says of them."""

    corpus: Corpus
    segments: list[Segment]
    references: list[str]
    in_split: int
    heard: Heard

    @classmethod
    def of(cls, config: QualityConfig, corpus_path: Path) -> "_Workload":
        corpus = read_corpus(corpus_path)
        segments = corpus.split(config.split, config.lang, config.limit)
        references = [scoring.one_line(t) for t in corpus.references(segments, config.lang)]
        in_split = len(corpus.split(config.split, config.lang))
        return cls(corpus, segments, references, in_split, Heard(corpus, segments))

    def source(self, index: int, reads: str) -> Source:
        segment = self.segments[index]
        if reads == "audio" and segment.audio:
            return self.heard(index)
        return read_source(reads, self.corpus, segment)

    def noisy(self, index: int, snr_db: float) -> Source:
        return conditions.with_noise(self.heard(index), snr_db, self.segments[index].id)


@dataclass(frozen=True)
class _Hypotheses:
    texts: list[str]
    stopped: dict[str, str]


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
    workload = _Workload.of(config, corpus)
    _warn_of_comet(config, workload, progress)
    models = _named([teacher, *students])
    sizes = [size.measure(model.path, model.given) for model in models]
    if config.threads:
        environment.pin_threads(config.threads)
    roles = ["teacher", *["student"] * len(students)]
    parents = {
        f"{role} {model.name}": model.path for role, model in zip(roles, models, strict=True)
    }
    parents["corpus"] = corpus
    is_made = has_translations(out, config, parents)
    paths = {model.name: model.path for model in models}
    known = {place: check_earlier(place, config, paths, corpus) for place in earlier}
    told = {own: identity(place) for place, names in known.items() for own in names}
    if is_made:
        known = {out: {name: name for name in paths}} | known
    translating = (set(config.recorded()) - SCORING_ALONE, set(parents))
    parents |= scorers(config)
    settings = config.recorded()
    with writing(out, "results", settings, config.seed, parents, work_needs=translating) as draft:
        ids = [segment.id for segment in workload.segments]
        for place, names in known.items():
            progress.message(f"{', '.join(names)}: as translated in {place}")
            take_over(place, names, draft.work, _chunks(workload.segments, config.batch_size), ids)
        found = _translate_all(config, models, workload, draft, progress)
        result = _result(config, models, sizes, workload, found, draft, progress)
        draft.extra.update(bench="quality", lang=config.lang, split=config.split)
        if told:
            draft.extra["taken_over"] = told
        write_json(draft.path / scoring.RESULT, result)
    return read(out)


def check_config(config: QualityConfig) -> None:
    """Refuses what is named and not there, before hours of translating.

    Raises:
        InputError: a COMET checkpoint, its interpreter or an embedding model that does not exist, or one that embeds nothing.
    """
    named = {
        "COMET checkpoint": (config.comet_checkpoint, "--comet-checkpoint"),
        "COMET interpreter": (config.comet_python, "--comet-python"),
        "embedding model": (config.embedding_model, "--embedding-model"),
    }
    for what, (path, option) in named.items():
        if path is not None and not Path(path).exists():
            raise InputError(
                f"The {what} {path} does not exist",
                mend=f"correct the path, or leave {option} (in a recipe, "
                f"{option[2:].replace('-', '_')}) out",
            )
    if config.embedding_model is not None:
        embedding.check(config.embedding_model)


def _warn_of_comet(config: QualityConfig, workload: "_Workload", progress: Progress) -> None:
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


def _named(given: Sequence[str | Path]) -> list[_Model]:
    """Names by directory, told apart where two are the same."""
    models: list[_Model] = []
    taken: set[str] = set()
    for path in given:
        local = Path(path) if Path(path).exists() else Path(resolve_model(path))
        stem = (Path(path).resolve() if Path(path).exists() else Path(path)).name or "model"
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        models.append(_Model(name, str(path), local))
    return models


def _translate_all(
    config: QualityConfig,
    models: Sequence[_Model],
    workload: _Workload,
    draft: Draft,
    progress: Progress,
) -> dict[str, _Hypotheses]:
    """Translations of every model, and of the teacher's controls, by name."""
    found: dict[str, _Hypotheses] = {}
    for place, model in enumerate(models):
        reads = family_of(model.path).reads
        heard = _controls(workload, reads) if place == 0 and config.controls else {}
        if config.noise_db is not None and reads == "audio":
            heard[conditions.NOISE] = partial(workload.noisy, snr_db=config.noise_db)
        elif config.noise_db is not None:
            progress.warn(f"{model.name} reads text: no noise for it")
        tasks = {model.name: partial(workload.source, reads=reads)} | {
            f"{model.name}.{control}": source for control, source in heard.items()
        }
        opened = _Opener(model.path, config.threads, progress)
        try:
            for name, source in tasks.items():
                found[name] = _translate(
                    name, source, reads, opened.translator, config, workload, draft, progress
                )
        finally:
            opened.close()
    return found


def _controls(workload: _Workload, reads: str) -> dict[str, Callable[[int], Source]]:
    """What a model is given in place of the segment: one that listens, or reads, does badly on it."""
    segments = workload.segments
    if reads == "text":
        other = shuffled_partners([len(s.source_text) for s in segments], workload.references)
        return {"shuffled_text": lambda index: workload.source(other[index], reads)}
    partners = shuffled_partners([s.duration_s for s in segments], workload.references)
    return {
        "shuffled_audio": lambda index: workload.source(partners[index], reads),
        "silence": lambda index: silence_like(workload.heard(index)),
    }


class _Opener:
    """Opens a model only when something is left to translate."""

    def __init__(self, path: Path, threads: int | None, progress: Progress) -> None:
        self._path, self._threads, self._progress = path, threads, progress
        self._open: Translator | None = None

    def translator(self) -> Translator:
        if self._open is None:
            self._open = open_translator(self._path, threads=self._threads, progress=self._progress)
        return self._open

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


def _translate(
    name: str,
    source: Callable[[int], Source],
    reads: str,
    translator: Callable[[], Translator],
    config: QualityConfig,
    workload: _Workload,
    draft: Draft,
    progress: Progress,
) -> _Hypotheses:
    """Translates every segment; chunks that an earlier run finished are read, not made again."""
    store = draft.work / f"{name}.jsonl"
    done = {record["chunk"]: record["rows"] for record in read_jsonl(store)}
    chunks = _chunks(workload.segments, config.batch_size)
    finished = sum(len(rows) for rows in done.values())
    started = time.monotonic()
    with progress.task(f"translate: {name}", len(workload.segments), finished) as advance:
        # The longest first: a lack of memory shows at once.
        for number, chunk in reversed(list(enumerate(chunks))):
            if number in done:
                continue
            sources = read_all(source, chunk)
            limits = [segment_limit(reads, workload.segments[index]) for index in chunk]
            translations = translator().translate(
                sources,
                config.lang,
                limits=limits,
                batch_size=config.batch_size,
                beams=config.beams,
            )
            rows = [
                [index, scoring.one_line(translation.text), _stopped(translation)]
                for index, translation in zip(chunk, translations, strict=True)
            ]
            append_jsonl(store, {"chunk": number, "rows": rows})
            done[number] = rows
            advance(len(chunk))
    audio_s = sum(segment.duration_s for segment in workload.segments)
    draft.timing(
        f"translate {name}", time.monotonic() - started, audio_s=round(audio_s, 2), resumed=finished
    )
    return _gather([row for rows in done.values() for row in rows], workload.segments)


def _stopped(translation: Translation) -> str:
    """Why a translation ended: scores are made without cutting loops, so they run to the limit."""
    if translation.stopped == "limit" and is_looping(translation.tokens):
        return "loop"
    return translation.stopped


def _chunks(segments: Sequence[Segment], batch_size: int) -> list[list[int]]:
    """Segments of like length together; the same chunks however often the run was killed."""
    order = sorted(
        range(len(segments)),
        key=lambda i: (
            segments[i].duration_s,
            0 if segments[i].audio else len(segments[i].source_text),
            i,
        ),
    )
    step = batch_size * _CHUNK_BATCHES
    return [order[i : i + step] for i in range(0, len(order), step)]


def _gather(rows: Sequence[Sequence[Any]], segments: Sequence[Segment]) -> _Hypotheses:
    texts = [""] * len(segments)
    stopped = {}
    for index, text, reason in rows:
        texts[index] = text
        if reason != "end":
            stopped[segments[index].id] = reason
    return _Hypotheses(texts, dict(sorted(stopped.items())))


def _result(
    config: QualityConfig,
    models: Sequence[_Model],
    sizes: Sequence[size.Size],
    workload: _Workload,
    found: dict[str, _Hypotheses],
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


def _write_lines(path: Path, workload: _Workload, found: dict[str, _Hypotheses]) -> None:
    segments = workload.segments
    scoring.write_lines(path / "ids.txt", [segment.id for segment in segments])
    scoring.write_lines(path / "sources.txt", [segment.source_text for segment in segments])
    scoring.write_lines(path / "references.txt", workload.references)
    for name, hypotheses in found.items():
        scoring.write_lines(path / "hypotheses" / f"{name}.txt", hypotheses.texts)
    if heard := conditions.voices(workload.corpus, segments):
        scoring.write_lines(path / conditions.VOICES, heard)
    write_json(path / "stopped.json", {name: found[name].stopped for name in found})


def _controls_of(found: dict[str, _Hypotheses], teacher: str) -> list[str]:
    return [control for control in scoring.CONTROLS if f"{teacher}.{control}" in found]


def _entry(
    config: QualityConfig,
    model: _Model,
    measured: size.Size,
    workload: _Workload,
    found: dict[str, _Hypotheses],
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
    workload: _Workload,
    found: dict[str, _Hypotheses],
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
