"""Ogg files, looked over before a decoder sees them.

A decoder that meets damage looks for the next page at every byte, and sums up to 65 kB for each
place that could be one: a few megabytes made for it keep it busy for minutes. Here a page begins
where the one before it ends, and its checksum is right, or the file is refused.
"""

import os
import zlib
from collections.abc import Callable

from serve.errors import bad_audio

HEADER_BYTES = 27
MOST_SEGMENTS = 255
FIRST_PAGE = 0x02
"""The flag of a page that begins a stream."""
PAGES_PER_S = 100
"""Most pages for each second of audio that is allowed; encoders write 1 to 50."""
MOST_LINKS = 1_000

_MIRRORED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def checksum(page: bytes) -> int:
    """Ogg's CRC-32 of a page whose own checksum is zeroed.

    It is zlib's without the inversions, and with the bits of each byte and of the sum mirrored.
    """
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def links(
    descriptor: int, max_audio_s: float, check: Callable[[], None]
) -> tuple[tuple[int, int], ...]:
    """The recordings of a file, which may be several in a chain.

    A page that the file's end cuts is left out.

    Args:
        descriptor: an open file, read without moving its offset.
        max_audio_s: the most audio that is allowed.
        check: called for each page, see `serve.audio_input.Check`.

    Returns:
        where each begins and ends, in bytes.

    Raises:
        ApiError: a damaged page, bytes between pages, or absurdly many pages or recordings.
    """
    most_pages = 1_000 + int(PAGES_PER_S * max_audio_s)
    starts: list[int] = []
    position, pages, begins = 0, 0, False
    while page := _page_at(descriptor, position):
        check()
        pages += 1
        # Streams that play at the same time all begin before the first of them goes on.
        continues, begins = begins, bool(page[5] & FIRST_PAGE)
        if not starts or (begins and not continues):
            starts.append(position)
        if pages > most_pages or len(starts) > MOST_LINKS:
            raise bad_audio("The Ogg file has absurdly many pages or recordings.")
        position += len(page)
    if not starts:
        raise bad_audio("The Ogg file ends before its first page does.")
    return tuple(zip(starts, [*starts[1:], position], strict=True))


def _page_at(descriptor: int, position: int) -> bytes:
    """A page; nothing where the file ends before it does.

    Raises:
        ApiError: something else is there.
    """
    head = os.pread(descriptor, HEADER_BYTES + MOST_SEGMENTS, position)
    if len(head) < HEADER_BYTES:
        return b""
    body = HEADER_BYTES + head[26]
    size = body + sum(head[HEADER_BYTES:body])
    page = os.pread(descriptor, size, position)
    # The end of the file may cut a page, but not one that is none.
    is_page = head.startswith(b"OggS\0")
    if is_page and len(page) < size:
        return b""
    stored = int.from_bytes(page[22:26], "little")
    if not is_page or checksum(page[:22] + bytes(4) + page[26:]) != stored:
        raise bad_audio(f"The Ogg file is damaged at byte {position}.")
    return page
