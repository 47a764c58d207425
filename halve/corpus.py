"""A corpus of segmented speech with translations: `manifest.jsonl`, one segment a line, beside its audio."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halve import environment
from halve.audio import SAMPLE_RATE_HZ, AudioInfo, FloatArray, decode_through, read_audio
from halve.errors import CorpusError
from halve.progress import SILENT, Progress

MANIFEST = "manifest.jsonl"
SPLITS = ("train", "select", "test")
_END_TOLERANCE_S = 0.02


@dataclass(frozen=True)
class Segment:
    """One stretch of speech and what it means."""

    id: str
    audio: str
    """Path of the audio file, relative to the corpus; empty where there is only text."""
    offset_s: float
    duration_s: float
    source_lang: str
    source_text: str
    references: dict[str, str]
    """Translations by language code."""
    split: str
    """train, select or test."""
    group: str
    """Talk, page or speaker: a group never straddles splits."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further facts of the manifest: voice, pcm_sha256, …"""

    def wants(self, lang: str) -> bool:
        """Whether a translation into `lang` says anything new: there is a reference, or it is spoken otherwise."""
        return lang in self.references or self.source_lang != lang

    def record(self) -> dict[str, Any]:
        """The manifest line."""
        return {
            "id": self.id,
            "audio": self.audio,
            "offset_s": self.offset_s,
            "duration_s": self.duration_s,
            "source_lang": self.source_lang,
            "source_text": self.source_text,
            "references": self.references,
            "split": self.split,
            "group": self.group,
            **self.extra,
        }


@dataclass(frozen=True)
class Corpus:
    """A readable corpus."""

    path: Path
    segments: tuple[Segment, ...]

    def split(self, name: str, lang: str | None = None, limit: int | None = None) -> list[Segment]:
        """The segments of a split, in the manifest's order.

        Args:
            lang: only those with a reference in this language.
            limit: at most so many, spread evenly over the split.

        Raises:
            CorpusError: none is left.
        """
        found = [
            segment
            for segment in self.segments
            if segment.split == name and (lang is None or lang in segment.references)
        ]
        if not found:
            counts = Counter(segment.split for segment in self.segments)
            having = sorted({code for segment in self.segments for code in segment.references})
            raise CorpusError(
                f"{self.path} has no {name} segment"
                + (f" with a {lang} reference" if lang else ""),
                expected=f"splits {dict(counts)} have references in {', '.join(having) or 'no language'}",
                mend="name another language, or import the corpus with the split that is missing",
            )
        return evenly(found, limit)

    def audio(self, segment: Segment) -> FloatArray:
        """The segment's samples, 16 kHz mono float32, shape (samples,)."""
        return read_audio(self.path / segment.audio, segment.offset_s, segment.duration_s)

    @staticmethod
    def references(segments: Iterable[Segment], lang: str) -> list[str]:
        """The reference translations of the segments into one language."""
        return [segment.references[lang] for segment in segments]


def evenly(segments: Sequence[Segment], limit: int | None) -> list[Segment]:
    """So many of the segments, spread evenly; all of them without a limit."""
    count = len(segments)
    if limit is None or limit >= count:
        return list(segments)
    return [segments[index * count // limit] for index in range(limit)]


def read_corpus(path: str | Path) -> Corpus:
    """Reads a corpus directory.

    Raises:
        CorpusError: no manifest, or lines that are no segments; every faulty line is named.
    """
    path = Path(path)
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CorpusError(
            f"{path} has no {MANIFEST}" if path.exists() else f"{path} does not exist",
            expected="a corpus directory",
            mend="make one with `halve corpus`",
        )
    segments: list[Segment] = []
    faults: list[str] = []
    for number, line in enumerate(_manifest_lines(manifest), start=1):
        if not line.strip():
            continue
        try:
            segments.append(_segment(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            faults.append(f"{manifest}:{number}: {_fault(error)}")
    if faults:
        raise CorpusError(f"{manifest}: {len(faults)} faulty lines", faults=faults)
    if not segments:
        raise CorpusError(f"{manifest} has no segment")
    return Corpus(path, tuple(segments))


def _manifest_lines(manifest: Path) -> list[str]:
    """Lines of JSON: other separators than a line feed (U+2028, say) belong to the texts."""
    data = manifest.read_bytes()
    try:
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CorpusError(
            f"{manifest}:{line}: not UTF-8", mend="convert the file, for example with iconv"
        ) from None


def _fault(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _segment(record: Any) -> Segment:
    if not isinstance(record, dict):
        raise ValueError("not a mapping of a segment's facts")
    record = dict(record)
    audio = _text(record.pop("audio", ""), "audio")
    duration = record.pop("duration_s") if audio else record.pop("duration_s", 0.0)
    known: dict[str, Any] = {
        "id": _name(record.pop("id"), "id"),
        "audio": audio,
        "offset_s": seconds(record.pop("offset_s", 0.0), "offset_s"),
        "duration_s": seconds(duration, "duration_s"),
        "source_lang": _text(record.pop("source_lang"), "source_lang"),
        "source_text": _text(record.pop("source_text", ""), "source_text"),
        "references": _references(record.pop("references")),
        "split": _text(record.pop("split"), "split"),
        "group": _name(record.pop("group"), "group"),
    }
    if audio and known["duration_s"] == 0:
        raise ValueError("duration_s is 0: the segment holds no sample")
    if known["split"] not in SPLITS:
        raise ValueError(f"split {known['split']!r} is none of {', '.join(SPLITS)}")
    return Segment(**known, extra=record)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {json.dumps(value)}, not a text")
    return value


def _name(value: object, name: str) -> str:
    """Numbers are names too: `"id": 5`."""
    return str(value) if type(value) is int else _text(value, name)


def _references(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"references is {json.dumps(value)}, not texts by language")
    return {lang: _text(text, f"the {lang} reference") for lang, text in value.items()}


def seconds(value: Any, name: str) -> float:
    """A time in seconds as a manifest, a table or a segments file writes it.

    Raises:
        ValueError: no finite number, or below zero.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} {value!r} is no number of seconds (0 or more)")
    return number


def write_manifest(path: Path, segments: Sequence[Segment]) -> None:
    """Writes `manifest.jsonl` into the directory `path`."""
    lines = [json.dumps(segment.record(), ensure_ascii=False) for segment in segments]
    (path / MANIFEST).write_text("\n".join(lines) + "\n", encoding="utf8")


def check_segments(
    root: Path, segments: Sequence[Segment], max_audio_s: float, where: Sequence[str] = ()
) -> list[str]:
    """Looks for everything that would spoil training or measuring later.

    Args:
        root: the directory that the segments' audio paths start from.
        max_audio_s: the longest audio that the model family hears.
        where: "file:line" of each segment, for the messages; its id where not given.

    Returns:
        One line a fault; empty when all is well.
    """
    places = list(where) or [segment.id for segment in segments]
    files = {segment.audio: root / segment.audio for segment in segments if segment.audio}
    heard = decode_all(list(files.values()))
    audio = {name: heard[path] for name, path in files.items()}
    faults = [
        f"{places[index]}: {fault}"
        for index, fault in segment_faults(segments, max_audio_s, places, audio)
    ]
    return faults + _group_faults(segments)


def segment_faults(
    segments: Sequence[Segment],
    max_audio_s: float,
    places: Sequence[str],
    audio: Mapping[str, AudioInfo | str],
    untranslated: bool = False,
    dropping: bool = False,
) -> Iterator[tuple[int, str]]:
    """The faults of single segments, each with the segment's index.

    Args:
        max_audio_s: the longest audio that the model family hears.
        places: "file:line" of each segment.
        audio: by `Segment.audio`, what `decode_all` heard.
        untranslated: `train` may have segments without a translation.
        dropping: faulty segments are left out: what is like one of them is no copy.
    """
    seen: dict[str, str] = {}
    texts: dict[tuple[str, str, str], str] = {}
    for index, segment in enumerate(segments):
        if not segment.references and not (untranslated and segment.split == "train"):
            yield index, "no translation"
        heard = _audio_faults(segment, audio[segment.audio], max_audio_s) if segment.audio else []
        known = ({}, {}) if heard and dropping else (seen, texts)
        for fault in _text_faults(segment, *known, places[index]):
            yield index, fault
        if segment.audio:
            for fault in heard:
                yield index, fault
        elif not segment.source_text.strip():
            yield index, "neither audio nor source text"


def decode_all(paths: Sequence[Path], progress: Progress = SILENT) -> dict[Path, AudioInfo | str]:
    """Decodes each file to its end: what it holds, or its fault in words."""
    found: dict[Path, AudioInfo | str] = {}
    if not paths:  # a corpus of texts
        return found
    # libsndfile decodes outside Python's lock: threads share the cores, each with one block in memory.
    with (
        progress.task("Decoding audio", len(paths)) as advance,
        ThreadPoolExecutor(min(8, environment.cores())) as pool,
    ):
        for path, heard in zip(paths, pool.map(_heard, paths), strict=True):
            found[path] = heard
            advance()
    return found


def _heard(path: Path) -> AudioInfo | str:
    try:
        return decode_through(path)
    except CorpusError as error:
        return str(error)


def _text_faults(
    segment: Segment, seen: dict[str, str], texts: dict[tuple[str, str, str], str], place: str
) -> list[str]:
    faults = []
    if segment.id in seen:
        faults.append(f"id {segment.id!r} is used twice (also {seen[segment.id]})")
    seen.setdefault(segment.id, place)
    for lang, text in segment.references.items():
        if not text.strip():
            faults.append(f"the {lang} text is empty")
    key = (segment.audio, f"{segment.offset_s:.3f}", "\0".join(segment.references.values()))
    # Of texts alone, the same ones twice are for --duplicates to judge.
    if segment.audio and key in texts:
        faults.append(f"same audio and text as {texts[key]}")
    texts.setdefault(key, place)
    return faults


def _audio_faults(segment: Segment, heard: AudioInfo | str, max_audio_s: float) -> list[str]:
    if isinstance(heard, str):
        return [heard]
    faults = []
    start_s, length_s = segment.offset_s, segment.duration_s
    end_s = start_s + length_s
    # Every comparison with NaN is false: only numbers that are finite and in order make a segment.
    if not (0 <= start_s < math.inf and 0 < length_s < math.inf):
        faults.append(f"offset {start_s} s and duration {length_s} s make no segment")
    elif end_s > heard.duration_s + _END_TOLERANCE_S:
        faults.append(
            f"ends at {end_s:.2f} s, past the end of {segment.audio} ({heard.duration_s:.2f} s)"
        )
    elif round((min(end_s, heard.duration_s) - start_s) * _rate_hz(heard)) < 1:
        faults.append(
            f"offset {start_s} s and duration {length_s} s hold no sample of {segment.audio} "
            f"({heard.duration_s:.2f} s at {heard.sample_rate_hz} Hz)"
        )
    if length_s > max_audio_s:
        faults.append(f"{length_s:.2f} s long, the model hears at most {max_audio_s:.0f} s")
    return faults


def _rate_hz(heard: AudioInfo) -> int:
    """The rate at which a segment must hold a sample: the file's own, and the model's."""
    return min(heard.sample_rate_hz, SAMPLE_RATE_HZ)


def _group_faults(segments: Sequence[Segment]) -> list[str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for segment in segments:
        splits[segment.group].add(segment.split)
    return [
        f"group {group!r} is in {' and '.join(sorted(names))}: its segments leak from one to the other"
        for group, names in sorted(splits.items())
        if len(names) > 1
    ]
