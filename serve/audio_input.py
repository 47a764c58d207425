"""Uploaded audio, which may be anything, as blocks of 16 kHz mono samples.

Only formats known by their first bytes reach a decoder; libsndfile reads most of them and ffmpeg,
where it is installed, the rest. Decoding goes block by block, so that memory does not grow with
length and a file that lies about itself, or unpacks to hours, is stopped at the limit.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from halve.audio import SAMPLE_RATE_HZ
from serve import ffmpeg, headers, mp3, ogg
from serve.errors import ApiError, bad_audio

FloatArray = NDArray[np.float32]
Check = Callable[[], None]
"""Called between blocks; raises when the request has no more time or its client is gone."""

LOWEST_RATE_HZ = 2_000
HIGHEST_RATE_HZ = 384_000
MOST_CHANNELS = 16
LOUDEST = 1e6
"""Float files may exceed full scale; beyond this a feature extractor would overflow."""
SHORTEST_S = 0.02
BLOCK_S = 1.0
BLOCK_VALUES = 1 << 20
"""Most values (frames times channels) decoded at once."""
MISSING_S = 0.5
"""A file that ends this much before its header says is reported as not fully covered."""
MANY_BYTES = 4096
"""So many bytes left over by a decoder are audio that was not heard, and no tag."""
ENDLESS_BYTES = 1 << 50
"""Guessed from this size, a length is one that is not known, see UNKNOWN_FRAMES."""
UNKNOWN_FRAMES = 1 << 44
"""A stream that does not say its length has so many frames or more, for libsndfile."""

READABLE = "WAV, FLAC, Ogg Opus or Vorbis, MP3, AIFF or AU"


MAGICS = {
    b"fLaC": "flac",
    b"OggS": "ogg",
    b".snd": "au",
    b"\x1a\x45\xdf\xa3": "webm",
    b"ID3": "mp3",
}


def sniff(head: bytes) -> str | None:
    """The container that a file's first 12 bytes announce, or None."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] == b"ftyp":
        return "mp4"
    for magic, container in MAGICS.items():
        if head.startswith(magic):
            return container
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        # The layer bits are 0 in AAC's frames and never in those of MPEG audio.
        return "mp3" if head[1] & 0x06 else "aac"
    return None


class _Forward(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read from its start to its end.

    soundfile seeks after each read, to where it is already. That resets the MP3 decoder, which is then
    wrong for the first samples of every block.
    """

    def seekable(self) -> bool:
        return False


class _Part:
    """Bytes of an open file as libsndfile reads them.

    Nothing moves the file's offset. When the request is over the file seems to end, so that a
    decoder which searches through it stops soon.
    """

    def __init__(self, descriptor: int, start: int, end: int, check: Check) -> None:
        self._descriptor = descriptor
        self._start = start
        self._size = end - start
        self._position = 0
        self._check = check

    def seek(self, offset: int, whence: int) -> None:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, min(base + offset, self._size))

    def tell(self) -> int:
        return self._position

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to read."""
        return self._position >= self._size

    @property
    def stopped_at(self) -> int:
        """Where in the file the next byte would be read."""
        return self._start + self._position

    def read(self, count: int) -> bytes:
        try:
            self._check()
        except ApiError:
            return b""
        count = min(count, self._size - self._position)
        data = os.pread(self._descriptor, count, self._start + self._position)
        self._position += len(data)
        return data


class _Endless(_Part):
    """The same for an MP3 decoder that would guess a length from the size, and stop there."""

    def seek(self, offset: int, whence: int) -> None:
        super().seek(offset, whence)
        if whence == os.SEEK_END:
            self._position = ENDLESS_BYTES + offset

    def read(self, count: int) -> bytes:
        if self._position > self._size:  # before the end that it was told, where it looks for a tag
            return bytes(count)
        data = super().read(count)
        if len(data) < count:
            # A frame that the file's end cuts is damage for one who does not know the end.
            data = data.ljust(count, b"\0") if data and count > mp3.HEADER_BYTES else b""
        return data


@dataclass
class Recording:
    """An upload being decoded, and what is known of it so far."""

    file: BinaryIO
    """Open for reading, seekable, with a file descriptor."""
    max_audio_s: float
    check: Check = field(default=lambda: None)
    decoded_s: float = 0.0
    claimed_s: float = 0.0
    """Length by the header: 0 where it does not say."""

    @property
    def duration_s(self) -> float:
        """Length of the recording, by its header where that claims much more than was found."""
        missing = self.claimed_s - self.decoded_s
        return self.claimed_s if missing > MISSING_S else self.decoded_s

    def take_file(self) -> BinaryIO:
        """Gives the recording a handle of its own, which the caller closes.

        Decoding in a thread may outlive the request, whose upload is closed at its end; the number
        of that handle is then another upload's.
        """
        self.file = os.fdopen(os.dup(self.file.fileno()), "rb")
        return self.file

    def blocks(self) -> Iterator[FloatArray]:
        """Decodes.

        Yields:
            float32, shape (samples,), 16 kHz mono, finite.

        Raises:
            ApiError: not audio, damaged, too long, too short, or samples that are not numbers.
        """
        container = sniff(os.pread(self.file.fileno(), 12, 0))
        if container is None:
            raise bad_audio(f"The file is not audio in a known format. Send {READABLE}.")
        if container in ffmpeg.DEMUXERS:
            raw = self._ffmpeg_blocks(container)
        else:
            raw = self._sound_blocks(container)
        for block in raw:
            self._count(block)
            yield block
        if self.decoded_s < SHORTEST_S:
            raise bad_audio("The file holds no audio.", code="empty_audio")

    def _count(self, block: FloatArray) -> None:
        self.decoded_s += len(block) / SAMPLE_RATE_HZ
        if self.decoded_s > self.max_audio_s + 0.01:
            raise too_long(self.max_audio_s)
        if not np.isfinite(block).all() or (len(block) and np.abs(block).max() > LOUDEST):
            raise bad_audio("The file holds samples that are not numbers, or absurdly large ones.")

    def _ffmpeg_blocks(self, container: str) -> Iterator[FloatArray]:
        descriptor = self.file.fileno()
        if container == "mp4":
            self.claimed_s = headers.mp4_audio_s(descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return ffmpeg.blocks(self.file, container, self.max_audio_s, self.check)

    def _sound_blocks(self, container: str) -> Iterator[FloatArray]:
        descriptor = self.file.fileno()
        found_share = headers.found_share(descriptor, container)
        try:
            for part in self._parts(descriptor, container):
                with _Forward(part) as sound:
                    self._check_header(sound, found_share)
                    yield from self._mono_blocks(sound, part)
        except (soundfile.SoundFileError, RuntimeError, ValueError, MemoryError):
            self.check()
            after = f" after {self.decoded_s:.1f} s" if self.decoded_s else ""
            raise bad_audio(
                f"The audio file is damaged{after}, or of a kind that is not known, and cannot be decoded."
            ) from None

    def _parts(self, descriptor: int, container: str) -> Iterator[_Part]:
        """The recordings of a file, of which the decoder hears one at a time."""
        end = os.fstat(descriptor).st_size
        if container == "ogg":
            for span in ogg.links(descriptor, self.max_audio_s, self.check):
                yield _Part(descriptor, *span, self.check)
            return
        if container == "mp3":
            yield from self._mp3_parts(descriptor, end)
            return
        part = _Part(descriptor, 0, end, self.check)
        yield part
        if container == "flac":
            self._count_unheard(part.stopped_at, end)

    def _mp3_parts(self, descriptor: int, end: int) -> Iterator[_Part]:
        """Where the next one begins is known when one is decoded."""
        start = 0
        for _ in range(mp3.MOST_RECORDINGS):
            kind = _Part if mp3.says_its_length(descriptor, start) else _Endless
            part = kind(descriptor, start, end, self.check)
            yield part
            self.check()
            following = mp3.next_recording(descriptor, part.stopped_at, self.check)
            if following is None:
                break
            start = following
        self._count_unheard(mp3.after_tags(descriptor, part.stopped_at), end)

    def _count_unheard(self, stopped_at: int, end: int) -> None:
        """Takes what a decoder has left over for audio like that which it has decoded."""
        if end - stopped_at >= MANY_BYTES:
            found_s = max(self.claimed_s, self.decoded_s)
            self.claimed_s = found_s + self.decoded_s * (end - stopped_at) / stopped_at

    def _check_header(self, sound: soundfile.SoundFile, found_share: float) -> None:
        rate, channels = sound.samplerate, sound.channels
        if not LOWEST_RATE_HZ <= rate <= HIGHEST_RATE_HZ:
            raise bad_audio(
                f"The audio's sample rate is {rate} Hz; it may be {LOWEST_RATE_HZ} to "
                f"{HIGHEST_RATE_HZ} Hz."
            )
        if not 1 <= channels <= MOST_CHANNELS:
            raise bad_audio(f"The audio has {channels} channels; it may have 1 to {MOST_CHANNELS}.")
        found_s = max(0, sound.frames) / rate if sound.frames < UNKNOWN_FRAMES else 0.0
        # What came before may have been longer than it said, or not have said it.
        before_s = max(self.claimed_s, self.decoded_s) if found_s else self.claimed_s
        if before_s + found_s > self.max_audio_s:
            raise too_long(self.max_audio_s)
        self.claimed_s = before_s + (found_s / found_share if found_share else 0.0)

    def _mono_blocks(self, sound: soundfile.SoundFile, part: _Part) -> Iterator[FloatArray]:
        rate = sound.samplerate
        frames = max(1, min(int(rate * BLOCK_S), BLOCK_VALUES // sound.channels))
        resampler = None
        if rate != SAMPLE_RATE_HZ:
            # The stream's output equals that of resampling the whole file at once, bit by bit.
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE_HZ, 1, dtype="float32")
        while True:
            self.check()
            data = self._read(sound, part, frames)
            last = len(data) < frames
            mono = data.mean(axis=1, dtype=np.float32) if data.shape[1] > 1 else data[:, 0]
            block = resampler.resample_chunk(mono, last=last) if resampler else mono
            if len(block):
                yield np.ascontiguousarray(block, dtype=np.float32)
            if last:
                return

    def _read(self, sound: soundfile.SoundFile, part: _Part, frames: int) -> FloatArray:
        """A block, (frames, channels); an empty one where a FLAC file was cut off: others end so, too.

        Its header must say how long it was: only then does the coverage tell what is missing.
        """
        try:
            return np.asarray(sound.read(frames, dtype="float32", always_2d=True))
        except soundfile.SoundFileError:
            self.check()
            cut_off = part.is_read and 0 < self.decoded_s < self.claimed_s
            if sound.format != "FLAC" or not cut_off:
                raise
            return np.zeros((0, sound.channels), np.float32)


def too_long(max_audio_s: float) -> ApiError:
    """Audio beyond the limit."""
    return bad_audio(
        f"The audio is longer than {max_audio_s:g} s. Send it in parts.", code="audio_too_long"
    )
