"""What the quality bench has models say: every model's translations, kept by its contents until a result is whole."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from benchmarks import conditions, scoring
from benchmarks.config import QualityConfig
from benchmarks.heard import Heard, read_all
from benchmarks.workload import shuffled_partners, silence_like
from export.manifest import MANIFEST, read_manifest
from export.runtime import open_translator
from halve.artefact import Draft, identity
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import InputError
from halve.families import Source
from halve.json_files import append_jsonl, read_jsonl
from halve.languages import language
from halve.models import family_of, resolve_model
from halve.progress import Progress
from halve.sources import check_sources, read_source, segment_limit
from halve.translate import Translation, Translator, is_looping

_CHUNK_BATCHES = 4
"""Batches between two points that a killed run can go on from."""
TRANSLATING = frozenset({"lang", "split", "limit", "batch_size", "beams", "threads"})
"""Settings that unfinished translations depend on, beside the model and what it is given."""


@dataclass(frozen=True)
class Model:
    """A model of a comparison."""

    name: str
    given: str
    path: Path

    @cached_property
    def reads(self) -> str:
        """audio or text."""
        return family_of(self.path).reads

    @cached_property
    def key(self) -> str:
        """Stands for its contents: where its translations are kept."""
        return identity(self.path)[:32]


@dataclass(frozen=True)
class Workload:
    """The segments in corpus order, and what the corpus says of them."""

    corpus: Corpus
    segments: list[Segment]
    references: list[str]
    in_split: int
    heard: Heard
    chunks: list[list[int]]
    """Segments of like length together; the same chunks however often the run was killed."""

    @classmethod
    def of(cls, config: QualityConfig, corpus_path: Path) -> "Workload":
        """The segments that a bench scores."""
        corpus = read_corpus(corpus_path)
        segments = corpus.split(config.split, config.lang, config.limit)
        references = [scoring.one_line(t) for t in corpus.references(segments, config.lang)]
        in_split = len(corpus.split(config.split, config.lang))
        chunks = _chunks(segments, config.batch_size)
        return cls(corpus, segments, references, in_split, Heard(corpus, segments), chunks)

    @property
    def ids(self) -> list[str]:
        """The segments' ids, as a result's lines have them."""
        return [scoring.one_line(segment.id) for segment in self.segments]

    def source(self, index: int, reads: str) -> Source:
        """What a model is given of a segment."""
        segment = self.segments[index]
        if reads == "audio" and segment.audio:
            return self.heard(index)
        return read_source(reads, self.corpus, segment)

    def noisy(self, index: int, snr_db: float) -> Source:
        """A segment's audio with noise."""
        return conditions.with_noise(self.heard(index), snr_db, self.segments[index].id)


@dataclass(frozen=True)
class Hypotheses:
    """One model's lines, and why those stopped that did not end by themselves, by segment."""

    texts: list[str]
    stopped: dict[str, str]


def named(given: Sequence[str | Path]) -> list[Model]:
    """Models named by directory, told apart where two are the same."""
    models: list[Model] = []
    taken: set[str] = set()
    for path in given:
        local = Path(path) if Path(path).exists() else Path(resolve_model(path))
        stem = (Path(path).resolve() if Path(path).exists() else Path(path)).name or "model"
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        models.append(Model(name, str(path), local))
    return models


def check_models(config: QualityConfig, models: Sequence[Model], workload: Workload) -> None:
    """Refuses what a model cannot translate, before another has translated for hours.

    Raises:
        CorpusError: a segment lacks what one of the models is given.
        InputError: a package was not made for the language.
    """
    code = language(config.lang).code
    for model in models:
        check_sources(model.reads, workload.corpus, workload.segments)
        if not (model.path / MANIFEST).is_file():
            continue
        manifest = read_manifest(model.path)
        if manifest.target != "checkpoint" and code not in manifest.languages:
            raise InputError(
                f"{model.given} does not translate into {language(code).name}",
                expected=f"a package made for it; this one is for {', '.join(manifest.languages)}",
                mend="leave it out, or make the package again with this language",
            )


def translate_all(
    config: QualityConfig,
    models: Sequence[Model],
    workload: Workload,
    draft: Draft,
    progress: Progress,
) -> dict[str, Hypotheses]:
    """Translations of every model, and of the teacher's controls, by name."""
    found: dict[str, Hypotheses] = {}
    for place, model in enumerate(models):
        heard = _controls(workload, model.reads) if place == 0 and config.controls else {}
        if config.noise_db is not None and model.reads == "audio":
            heard[conditions.NOISE] = partial(workload.noisy, snr_db=config.noise_db)
        elif config.noise_db is not None:
            progress.warn(f"{model.name} reads text: no noise for it")
        tasks = {"": partial(workload.source, reads=model.reads)} | heard
        opened = _Opener(model.path, config.threads, progress)
        try:
            for condition, source in tasks.items():
                name = f"{model.name}.{condition}" if condition else model.name
                store = store_of(draft.work, model, condition, config.noise_db)
                found[name] = _translate(
                    name, store, source, model.reads, opened, config, workload, draft, progress
                )
        finally:
            opened.close()
    return found


def store_of(work: Path, model: Model, condition: str, noise_db: float | None) -> Path:
    """Where a model's finished chunks lie under a condition: empty, a control's name, or noise."""
    strength = f"-{noise_db:g}" if condition == conditions.NOISE else ""
    return work / f"{model.key}{f'.{condition}' if condition else ''}{strength}.jsonl"


def _controls(workload: Workload, reads: str) -> dict[str, Callable[[int], Source]]:
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


def read_store(store: Path) -> dict[int, list[list[object]]]:
    """The finished chunks of a store: rows of segment, text and why it stopped, by the chunk's number."""
    return {record["chunk"]: record["rows"] for record in read_jsonl(store)}


def _translate(
    name: str,
    store: Path,
    source: Callable[[int], Source],
    reads: str,
    opened: _Opener,
    config: QualityConfig,
    workload: Workload,
    draft: Draft,
    progress: Progress,
) -> Hypotheses:
    """Translates every segment; chunks that an earlier run finished are read, not made again."""
    done = read_store(store)
    finished = sum(len(rows) for rows in done.values())
    started = time.monotonic()
    with progress.task(f"translate: {name}", len(workload.segments), finished) as advance:
        # The longest first: a lack of memory shows at once.
        for number, chunk in reversed(list(enumerate(workload.chunks))):
            if number in done:
                continue
            sources = read_all(source, chunk)
            limits = [segment_limit(reads, workload.segments[index]) for index in chunk]
            translations = opened.translator().translate(
                sources,
                config.lang,
                limits=limits,
                batch_size=config.batch_size,
                beams=config.beams,
            )
            rows: list[list[object]] = [
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
    return _gather(done, workload.segments)


def _stopped(translation: Translation) -> str:
    """Why a translation ended: scores are made without cutting loops, so they run to the limit."""
    if translation.stopped == "limit" and is_looping(translation.tokens):
        return "loop"
    return translation.stopped


def _chunks(segments: Sequence[Segment], batch_size: int) -> list[list[int]]:
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


def _gather(
    chunks: Mapping[int, Sequence[Sequence[object]]], segments: Sequence[Segment]
) -> Hypotheses:
    texts = [""] * len(segments)
    stopped: dict[str, str] = {}
    for rows in chunks.values():
        for index, text, reason in rows:
            assert isinstance(index, int)
            texts[index] = str(text)
            if reason != "end":
                stopped[segments[index].id] = str(reason)
    return Hypotheses(texts, dict(sorted(stopped.items())))
