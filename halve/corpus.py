"""A corpus of segmented speech with translations: `manifest.jsonl`, one segment a line, beside its audio."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halve.audio import FloatArray, probe, read_audio
from halve.errors import CorpusError

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
        if limit is not None and limit < len(found):
            found = [found[index * len(found) // limit] for index in range(limit)]
        return found

    def audio(self, segment: Segment) -> FloatArray:
        """The segment's samples, 16 kHz mono float32, shape (samples,)."""
        return read_audio(self.path / segment.audio, segment.offset_s, segment.duration_s)

    @staticmethod
    def references(segments: Iterable[Segment], lang: str) -> list[str]:
        """The reference translations of the segments into one language."""
        return [segment.references[lang] for segment in segments]


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
    return manifest.read_text(encoding="utf8").split("\n")


def _fault(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _segment(record: dict[str, Any]) -> Segment:
    record = dict(record)
    audio = str(record.pop("audio", ""))
    known: dict[str, Any] = {
        "id": str(record.pop("id")),
        "audio": audio,
        "offset_s": float(record.pop("offset_s", 0.0)),
        "duration_s": float(record.pop("duration_s") if audio else record.pop("duration_s", 0.0)),
        "source_lang": str(record.pop("source_lang")),
        "source_text": str(record.pop("source_text", "")),
        "references": dict(record.pop("references")),
        "split": str(record.pop("split")),
        "group": str(record.pop("group")),
    }
    if known["split"] not in SPLITS:
        raise ValueError(f"split {known['split']!r} is none of {', '.join(SPLITS)}")
    return Segment(**known, extra=record)


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
    faults: list[str] = []
    lengths: dict[str, float | str] = {}
    seen: dict[str, str] = {}
    texts: dict[tuple[str, str, str], str] = {}
    for index, segment in enumerate(segments):
        place = where[index] if where else segment.id
        faults += [f"{place}: {fault}" for fault in _text_faults(segment, seen, texts, place)]
        if not segment.audio:
            if not segment.source_text.strip():
                faults.append(f"{place}: neither audio nor source text")
            continue
        if segment.audio not in lengths:
            lengths[segment.audio] = _length(root / segment.audio)
        faults += [
            f"{place}: {fault}"
            for fault in _audio_faults(segment, lengths[segment.audio], max_audio_s)
        ]
    return faults + _group_faults(segments)


def _text_faults(
    segment: Segment, seen: dict[str, str], texts: dict[tuple[str, str, str], str], place: str
) -> list[str]:
    faults = []
    if segment.id in seen:
        faults.append(f"id {segment.id!r} is used twice (also {seen[segment.id]})")
    seen.setdefault(segment.id, place)
    if not segment.references:
        faults.append("no translation")
    for lang, text in segment.references.items():
        if not text.strip():
            faults.append(f"the {lang} text is empty")
    heard = segment.audio or segment.source_text
    key = (heard, f"{segment.offset_s:.3f}", "\0".join(segment.references.values()))
    if key in texts:
        faults.append(f"same {'audio and ' if segment.audio else ''}text as {texts[key]}")
    texts.setdefault(key, place)
    return faults


def _length(path: Path) -> float | str:
    try:
        return probe(path).duration_s
    except CorpusError as error:
        return str(error)


def _audio_faults(segment: Segment, length: float | str, max_audio_s: float) -> list[str]:
    if isinstance(length, str):
        return [length]
    faults = []
    end_s = segment.offset_s + segment.duration_s
    if segment.duration_s <= 0 or segment.offset_s < 0:
        faults.append(
            f"offset {segment.offset_s} s and duration {segment.duration_s} s make no segment"
        )
    elif end_s > length + _END_TOLERANCE_S:
        faults.append(f"ends at {end_s:.2f} s, past the end of {segment.audio} ({length:.2f} s)")
    if segment.duration_s > max_audio_s:
        faults.append(
            f"{segment.duration_s:.2f} s long, the model hears at most {max_audio_s:.0f} s"
        )
    return faults


def _group_faults(segments: Sequence[Segment]) -> list[str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for segment in segments:
        splits[segment.group].add(segment.split)
    return [
        f"group {group!r} is in {' and '.join(sorted(names))}: its segments leak from one to the other"
        for group, names in sorted(splits.items())
        if len(names) > 1
    ]
