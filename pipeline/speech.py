"""How much speech a recipe's corpus holds, as far as it is here to be counted."""

from dataclasses import dataclass
from pathlib import Path

from halve.corpus import read_corpus
from halve.errors import HalveError
from halve.importers.base import CorpusConfig, Row, Sound

LETTERS_PER_SECOND = 15
"""How a text without audio is counted: as long as it takes to say."""
ASSUMED_SEGMENTS = 1000
ASSUMED_SEGMENT_S = 6.0
"""Of a corpus that is not here yet."""


@dataclass(frozen=True)
class Speech:
    """What a corpus holds: segments by split, their mean length, stored bytes."""

    segments: dict[str, int]
    mean_s: float
    stored_bytes: int
    assumed: bool = False
    why: str = ""
    """Of what is assumed: why it is not known."""
    untranslated: int = 0
    """Segments of `train` without any reference."""

    def count(self, split: str, limit: int | None = None, untranslated: bool = False) -> int:
        """Segments of a split that a stage uses; those without a reference among them where it says so."""
        found = self.segments.get(split, 0)
        if split == "train" and not untranslated:
            found -= self.untranslated
        return found if limit is None else min(limit, found)


def find_speech(corpus: Path, section: CorpusConfig, source: str) -> Speech:
    """The corpus as imported, else as its source tells, else assumed.

    Args:
        corpus: where the imported corpus lies, or will lie.
        source: what it is imported from.
    """
    try:
        return _imported(corpus)
    except (HalveError, OSError):
        pass
    try:
        if section.format == "hf" and not Path(source).exists():
            raise HalveError("the corpus is not here")
        if not Path(source).exists():
            raise HalveError(f"{source} does not exist")
        return _in_source(section, source)
    except (HalveError, OSError) as error:
        counts = _shared(ASSUMED_SEGMENTS, section)
        stored = round(ASSUMED_SEGMENTS * ASSUMED_SEGMENT_S * 32_000)
        why = getattr(error, "found", "") or str(error)
        return Speech(counts, ASSUMED_SEGMENT_S, stored, assumed=True, why=why)


def _imported(path: Path) -> Speech:
    segments = read_corpus(path).segments
    counts: dict[str, int] = {}
    for segment in segments:
        counts[segment.split] = counts.get(segment.split, 0) + 1
    files = {s.audio for s in segments if s.audio}
    stored = sum((path / name).stat().st_size for name in files)
    length_s = sum(s.duration_s or len(s.source_text) / LETTERS_PER_SECOND for s in segments)
    plain = sum(s.split == "train" and not s.references for s in segments)
    return Speech(counts, length_s / len(segments), stored, untranslated=plain)


def _in_source(section: CorpusConfig, source: str) -> Speech:
    from halve.importers import read_source

    rows = read_source(section, source).rows
    lengths = [
        len(row.source_text) / LETTERS_PER_SECOND if row.audio is None else row.duration_s or 0.0
        for row in rows
        if row.audio is None or row.duration_s is not None
    ]
    mean_s = sum(lengths) / len(lengths) if lengths else ASSUMED_SEGMENT_S
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.split or ""] = counts.get(row.split or "", 0) + 1
    keep = section.untranslated == "keep"
    empty = [row for row in rows if keep and not any(map(str.strip, row.references.values()))]
    if "" in counts or section.split in ("group", "segment", "paper"):
        counts = _shared(len(rows) - len(empty), section)
        counts["train"] += len(empty)
    else:
        empty = [row for row in empty if row.split == "train"]
    return Speech(
        counts,
        mean_s,
        _stored(rows),
        why="" if lengths else "no durations in the source",
        untranslated=len(empty),
    )


def _stored(rows: list[Row]) -> int:
    files = {row.audio for row in rows if isinstance(row.audio, Path)}
    inline = sum(row.audio.size_bytes for row in rows if isinstance(row.audio, Sound))
    return inline + sum(path.stat().st_size for path in files if path.is_file())


def _shared(count: int, section: CorpusConfig) -> dict[str, int]:
    test, select = round(count * section.test_share), round(count * section.select_share)
    return {"test": test, "select": select, "train": count - test - select}
