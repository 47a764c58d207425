"""MP3 files, whose decoder believes in one length for all that is in them.

libsndfile stops where an Info frame at the start says that the recording ends, although others may
follow in the same file; without such a frame it guesses a length from the size of the first frames
and stops there.
"""

import os
from collections.abc import Callable

HEADER_BYTES = 4
"""Of a frame."""
MOST_RECORDINGS = 1_000
MOST_TAGS = 100
"""Tags in a row that are skipped."""
SEARCHED_BYTES = 1 << 14
"""Looked through for a frame where none follows at once."""

_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_RATES_HZ = {
    3: (44_100, 48_000, 32_000, 0),
    2: (22_050, 24_000, 16_000, 0),
    0: (11_025, 12_000, 8_000, 0),
}
"""By the two bits that say the version: MPEG 1, 2 and 2.5."""


def frame_bytes(header: bytes) -> int:
    """Size of the frame of layer 3 that four bytes begin; 0 where they begin none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version = header[1] >> 3 & 3
    rate_hz = _RATES_HZ.get(version, (0,) * 4)[header[2] >> 2 & 3]
    kbits = (_KBITS_1 if version == 3 else _KBITS_2)[header[2] >> 4]
    if not rate_hz or not kbits:
        return 0
    return (144_000 if version == 3 else 72_000) * kbits // rate_hz + (header[2] >> 1 & 1)


def after_tags(descriptor: int, position: int) -> int:
    """Where the tags (ID3, APE) that begin at a place end."""
    for _ in range(MOST_TAGS):
        head = os.pread(descriptor, 16, position)
        if head.startswith(b"TAG"):
            position += 128
        elif head.startswith(b"ID3") and len(head) > 9:
            # Seven bits a byte, so that no size looks like a frame.
            position += 10 + sum(
                (byte & 127) << 7 * place for place, byte in enumerate(head[9:5:-1])
            )
        elif head.startswith(b"APETAGEX"):
            position += 32 + int.from_bytes(head[12:16], "little")
        else:
            break
    return position


def says_its_length(descriptor: int, start: int) -> bool:
    """Whether a recording's first frame is an Info frame that counts the others."""
    start = after_tags(descriptor, start)
    head = os.pread(descriptor, 64, start)
    for mark in (b"Xing", b"Info"):
        found = head.find(mark)
        if found > 0:
            flags, frames = head[found + 4 : found + 8], head[found + 8 : found + 12]
            return bool(flags[-1:] and flags[-1] & 1 and any(frames))
    return False


def next_recording(descriptor: int, position: int, check: Callable[[], None]) -> int | None:
    """Where two frames in a row begin, after a place at which the decoder has stopped; None without any.

    It may have read the next frame's header already. What it left of the last recording is at most a
    frame of padding, and one is not looked for.
    """
    if _are_two(descriptor, position - HEADER_BYTES):
        return position - HEADER_BYTES
    position = after_tags(descriptor, position)
    window = os.pread(descriptor, SEARCHED_BYTES, position)
    place = window.find(b"\xff")
    while place >= 0:
        check()
        if frame_bytes(window[place : place + 4]) and _are_two(descriptor, position + place):
            return position + place
        place = window.find(b"\xff", place + 1)
    return None


def _are_two(descriptor: int, position: int) -> bool:
    """Whether a frame is followed by another of its version and sample rate."""
    first = os.pread(descriptor, HEADER_BYTES, max(0, position))
    size = frame_bytes(first)
    second = os.pread(descriptor, HEADER_BYTES, position + size) if size else b""
    if not frame_bytes(second):
        return False
    return first[1] >> 3 == second[1] >> 3 and first[2] >> 2 & 3 == second[2] >> 2 & 3
