"""How much audio a file's header promises, where a decoder reports only what it found.

A file that was cut off decodes without complaint. What is missing shows in the coverage of the
answer, for which the header's own figure is needed.
"""

import os
from collections.abc import Iterator
from typing import Literal

STREAMED_BYTES = 0x7FFF_0000
"""Programs that write into a pipe cannot know the length and write this much or more, or 0."""
MOST_CHUNKS = 1_000
"""Chunks or boxes looked at in a file."""

Span = tuple[int, int]
"""Where something begins and ends in a file, in bytes."""
Order = Literal["little", "big"]


def found_share(descriptor: int, container: str) -> float:
    """Share of the samples promised by a WAV, AIFF or AU header that the file holds, 0 to 1.

    It is 1 where the header does not say, and in other containers.
    """
    find = {"wav": _wav_data, "aiff": _aiff_data, "au": _au_data}.get(container)
    span = find(descriptor) if find else None
    if span is None or not 0 < span[1] - span[0] < STREAMED_BYTES:
        return 1.0
    found = os.fstat(descriptor).st_size - span[0]
    return min(1.0, max(0, found) / (span[1] - span[0]))


def _wav_data(descriptor: int) -> Span | None:
    order: Order = "big" if os.pread(descriptor, 4, 0) == b"RIFX" else "little"
    return _chunk(descriptor, b"data", order)


def _aiff_data(descriptor: int) -> Span | None:
    return _chunk(descriptor, b"SSND", "big")


def _au_data(descriptor: int) -> Span | None:
    head = os.pread(descriptor, 12, 0)
    start, size = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    return start, start + size


def _chunk(descriptor: int, kind: bytes, order: Order) -> Span | None:
    """Where the content of a RIFF or IFF file's first chunk of one kind lies, by its header."""
    position = 12
    for _ in range(MOST_CHUNKS):
        head = os.pread(descriptor, 8, position)
        if len(head) < 8:
            return None
        size = int.from_bytes(head[4:], order)
        if head[:4] == kind:
            return position + 8, position + 8 + size
        position += 8 + size + size % 2
    return None


def mp4_audio_s(descriptor: int) -> float:
    """Length of an MP4 file's first audio track after its edits; 0 where the file does not say."""
    seen = [0]
    whole = (0, os.fstat(descriptor).st_size)
    for movie in _boxes(descriptor, whole, b"moov", seen):
        scale = _number(descriptor, movie, b"mvhd", (12, 4), (20, 4), seen)
        for track in _boxes(descriptor, movie, b"trak", seen):
            if scale and _is_sound(descriptor, track, seen):
                length = _number(descriptor, track, b"tkhd", (20, 4), (28, 8), seen)
                return length / scale if length < 0xFFFF_FFFF else 0.0
    return 0.0


def _is_sound(descriptor: int, track: Span, seen: list[int]) -> bool:
    for media in _boxes(descriptor, track, b"mdia", seen):
        for start, _ in _boxes(descriptor, media, b"hdlr", seen):
            return os.pread(descriptor, 4, start + 8) == b"soun"
    return False


def _number(
    descriptor: int, parent: Span, kind: bytes, old: Span, new: Span, seen: list[int]
) -> int:
    """A field of a box, given as (offset, bytes) in version 0 and in version 1; 0 without it."""
    for start, _ in _boxes(descriptor, parent, kind, seen):
        offset, size = new if os.pread(descriptor, 1, start) == b"\1" else old
        return int.from_bytes(os.pread(descriptor, size, start + offset), "big")
    return 0


def _boxes(descriptor: int, parent: Span, kind: bytes, seen: list[int]) -> Iterator[Span]:
    """Where the content of each box of one kind lies; `seen` counts boxes over all calls."""
    position, end = parent
    while position + 8 <= end and seen[0] < MOST_CHUNKS:
        seen[0] += 1
        head = os.pread(descriptor, 16, position)
        size, begin = int.from_bytes(head[:4], "big"), 8
        if size == 1:
            size, begin = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = end - position
        if size < begin:
            return
        if head[4:8] == kind:
            yield position + begin, min(end, position + size)
        position += size
