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
from serve import ffmpeg
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

    def blocks(self) -> Iterator[FloatArray]:
        """Decodes.

        Yields:
            float32, shape (samples,), 16 kHz mono, finite.

        Raises:
            ApiError: not audio, damaged, too long, too short, or samples that are not numbers.
        """
        descriptor = self.file.fileno()
        container = sniff(os.pread(descriptor, 12, 0))
        os.lseek(descriptor, 0, os.SEEK_SET)
        if container is None:
            raise bad_audio(f"The file is not audio in a known format. Send {READABLE}.")
        if container in ffmpeg.DEMUXERS:
            raw = ffmpeg.blocks(self.file, container, self.max_audio_s, self.check)
        else:
            raw = self._sound_blocks()
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

    def _sound_blocks(self) -> Iterator[FloatArray]:
        try:
            with _Forward(self.file.fileno(), closefd=False) as sound:
                self._check_header(sound)
                yield from self._mono_blocks(sound)
        except (soundfile.SoundFileError, RuntimeError, ValueError, MemoryError):
            after = f" after {self.decoded_s:.1f} s" if self.decoded_s else ""
            raise bad_audio(f"The audio file is damaged{after} and cannot be decoded.") from None

    def _check_header(self, sound: soundfile.SoundFile) -> None:
        rate, channels = sound.samplerate, sound.channels
        if not LOWEST_RATE_HZ <= rate <= HIGHEST_RATE_HZ:
            raise bad_audio(
                f"The audio's sample rate is {rate} Hz; it may be {LOWEST_RATE_HZ} to "
                f"{HIGHEST_RATE_HZ} Hz."
            )
        if not 1 <= channels <= MOST_CHANNELS:
            raise bad_audio(f"The audio has {channels} channels; it may have 1 to {MOST_CHANNELS}.")
        self.claimed_s = max(0, sound.frames) / rate
        if self.claimed_s > self.max_audio_s:
            raise too_long(self.max_audio_s)

    def _mono_blocks(self, sound: soundfile.SoundFile) -> Iterator[FloatArray]:
        rate = sound.samplerate
        frames = max(1, min(int(rate * BLOCK_S), BLOCK_VALUES // sound.channels))
        resampler = None
        if rate != SAMPLE_RATE_HZ:
            # The stream's output equals that of resampling the whole file at once, bit by bit.
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE_HZ, 1, dtype="float32")
        while True:
            self.check()
            data = sound.read(frames, dtype="float32", always_2d=True)
            last = len(data) < frames
            mono = data.mean(axis=1, dtype=np.float32) if data.shape[1] > 1 else data[:, 0]
            block = resampler.resample_chunk(mono, last=last) if resampler else mono
            if len(block):
                yield np.ascontiguousarray(block, dtype=np.float32)
            if last:
                return


def too_long(max_audio_s: float) -> ApiError:
    """Audio beyond the limit."""
    return bad_audio(
        f"The audio is longer than {max_audio_s:g} s. Send it in parts.", code="audio_too_long"
    )
