"""What organisers of shared tasks look for in a file of translations before they score it."""

from collections.abc import Sequence
from statistics import median

MAX_LENGTH_RATIO = 2.0


def doubtful_lines(
    translations: Sequence[str], source_lengths: Sequence[float], wanted: int | None = None
) -> list[str]:
    """Faults of a file of translations, one sentence each: a wrong count, empty and over-long lines.

    How long a translation ought to be depends on the two languages, so a line's length is held against
    what is usual in the same file: the median of characters per unit of source, times the line's source.

    Args:
        source_lengths: of each line's source, in characters of text or seconds of speech.
        wanted: how many lines there must be.
    """
    faults = []
    if wanted is not None and len(translations) != wanted:
        faults.append(f"{len(translations)} lines, where {wanted} are wanted")
    pairs = list(zip(translations, source_lengths, strict=False))
    empty = [place for place, (text, length) in enumerate(pairs, 1) if not text.strip() and length]
    ratios = [len(text) / length for text, length in pairs if text.strip() and length]
    usual = median(ratios) if ratios else 0.0
    long = [
        place
        for place, (text, length) in enumerate(pairs, 1)
        if length and len(text) > MAX_LENGTH_RATIO * usual * length and len(text) > 20
    ]
    if empty:
        faults.append(f"{len(empty)} empty lines: {numbered(empty)}")
    if long:
        faults.append(
            f"{len(long)} lines over {MAX_LENGTH_RATIO:g} times as long as usual for their source: "
            f"{numbered(long)}"
        )
    return faults


def numbered(places: Sequence[int]) -> str:
    """The first ten of them."""
    shown = ", ".join(map(str, places[:10]))
    return f"{shown}, …" if len(places) > 10 else shown
