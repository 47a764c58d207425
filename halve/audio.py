"""Audio in: any file libsndfile reads becomes 16 kHz mono float32."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from halve.errors import CorpusError

SAMPLE_RATE_HZ = 16_000

FloatArray = NDArray[np.float32]

_BLOCK_FRAMES = 1 << 16
# Headers may count an encoder's padding, which decoders leave out.
_SLACK_S = 0.1
# libsndfile takes a WAV's length from the bytes that are there, and notes what its header said.
_CUT_WAV = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
# Written to a pipe, a WAV's header says about this or twice as much: not known.
_UNKNOWN_BYTES = 0x7FFF_0000
# A FLAC's says nothing then: libsndfile gives its highest number, and fails at the end of the file.
_UNKNOWN_FRAMES = 1 << 62

# A frame of padding may be left over.
_LEFT_OVER_S = 0.5
# What follows in an MP3: a frame, whose header may have been read, or a tag before some.
_GOES_ON = re.compile(rb"(?:.{4}(?:TAG.{125})?)?(?:ID3|\xff[\xe0-\xff])", re.DOTALL)

_MEND = "convert it to 16 kHz mono WAV, FLAC or Ogg Opus, for example with ffmpeg or sox"


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    duration_s: float
    sample_rate_hz: int
    channels: int
    frames: int


def probe(path: str | Path) -> AudioInfo:
    """Reads a file's header.

    Raises:
        CorpusError: missing, empty, or no audio that libsndfile can read.
    """
    path = Path(path)
    if path.is_dir():
        raise CorpusError(f"{path} is a folder", expected=f"audio files, such as {path}/*.wav")
    if not path.is_file():
        raise CorpusError(f"{path}: no such audio file")
    if path.stat().st_size == 0:
        raise CorpusError(
            f"{path}: the audio file is empty (0 bytes)", mend="record or copy it again"
        )
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise CorpusError(
            f"{path}: not readable as audio ({error_text(error)})", mend=_MEND
        ) from None
    if info.frames <= 0 or info.samplerate <= 0:
        raise CorpusError(f"{path}: holds no audio samples", mend="record or copy it again")
    if info.frames >= _UNKNOWN_FRAMES:
        raise CorpusError(f"{path}: its header does not say how long it is", mend=_MEND)
    return AudioInfo(info.frames / info.samplerate, info.samplerate, info.channels, info.frames)


def decode_through(path: str | Path) -> AudioInfo:
    """Decodes a file to its end, a block at a time, so that memory stays flat however long it is.

    Returns:
        what was decoded: of a header that counts padding, the true length.

    Raises:
        CorpusError: as `probe`, and where the samples end before the header says, an MP3 goes on after it, or
            they are not finite numbers.
    """
    info = probe(path)
    frames, promised = 0, info.frames
    slack = round(_SLACK_S * info.sample_rate_hz)
    try:
        with _opened(path) as (file, descriptor):
            promised = _promised_frames(file)
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                if not np.isfinite(block).all():
                    raise CorpusError(
                        f"{path}: holds samples that are not finite numbers", mend=_MEND
                    )
                frames += len(block)
            _check_left_over(path, file, descriptor, frames)
    except (soundfile.SoundFileError, RuntimeError):
        slack = -1  # it broke off, however near to the end
    if frames < promised - slack:
        raise CorpusError(
            f"{path}: damaged or cut short: of {promised / info.sample_rate_hz:.2f} s only the first "
            f"{frames / info.sample_rate_hz:.2f} s can be decoded",
            mend="copy or convert it again",
        )
    return AudioInfo(frames / info.sample_rate_hz, info.sample_rate_hz, info.channels, frames)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[soundfile.SoundFile, int]]:
    """A file, and the descriptor that libsndfile reads it through."""
    with (
        open(path, "rb", buffering=0) as raw,
        soundfile.SoundFile(raw.fileno(), closefd=False) as file,
    ):
        yield file, raw.fileno()


def _check_left_over(
    path: str | Path, file: soundfile.SoundFile, descriptor: int, frames: int
) -> None:
    """Refuses an MP3 that goes on where libsndfile has stopped, after so many frames.

    libsndfile believes the first length that is in the file, and guesses one where there is none.
    """
    if file.format != "MP3":
        return
    stopped_at = os.lseek(descriptor, 0, os.SEEK_CUR)
    heard_s = frames / file.samplerate
    left_s = heard_s * (os.fstat(descriptor).st_size - stopped_at) / stopped_at
    if left_s > _LEFT_OVER_S and _GOES_ON.match(os.pread(descriptor, 256, stopped_at - 4)):
        raise CorpusError(
            f"{path}: only its first {heard_s:.2f} s can be decoded and about {left_s:.2f} s follow: it is several "
            "MP3 files in one, or does not say how long it is",
            mend=_MEND,
        )


def _promised_frames(file: soundfile.SoundFile) -> int:
    """How many frames the header says there are."""
    cut = _CUT_WAV.search(file.extra_info)
    if cut and int(cut[2]) and int(cut[1]) < _UNKNOWN_BYTES:
        return int(file.frames * int(cut[1]) / int(cut[2]))
    return int(file.frames)


def error_text(error: BaseException) -> str:
    """libsndfile's message without the path that it repeats."""
    return str(error).split(": ")[-1].strip().rstrip(".") or type(error).__name__


def read_audio(
    path: str | Path, offset_s: float = 0.0, duration_s: float | None = None
) -> FloatArray:
    """Reads a stretch of a file as 16 kHz mono.

    Returns:
        samples, float32 in [-1, 1], shape (samples,).

    Raises:
        CorpusError: missing, empty or unreadable, samples that are not finite numbers, or an MP3 that is to
            be read to its end and goes on after it.
    """
    info = probe(path)
    start = round(offset_s * info.sample_rate_hz)
    frames = -1 if duration_s is None else round(duration_s * info.sample_rate_hz)
    try:
        with _opened(path) as (file, descriptor):
            if start:
                file.seek(min(start, info.frames))
            data = file.read(frames, dtype="float32", always_2d=True)
            if duration_s is None:
                _check_left_over(path, file, descriptor, start + len(data))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise CorpusError(
            f"{path}: not readable as audio ({error_text(error)})", mend=_MEND
        ) from None
    if not len(data):
        raise CorpusError(
            f"{path}: no sample from {offset_s} s on, the file is {info.duration_s:.2f} s long",
            mend="correct the offset and the duration",
        )
    return to_model_rate(data, info.sample_rate_hz, str(path))


def decode_audio(file: BinaryIO, name: str = "the audio") -> FloatArray:
    """Reads a whole open audio file, as `read_audio` does.

    Raises:
        CorpusError: not audio that libsndfile can read.
    """
    try:
        data, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise CorpusError(
            f"{name}: not readable as audio ({error_text(error)})", mend=_MEND
        ) from None
    return to_model_rate(data, rate, name)


def to_model_rate(data: NDArray[np.float32], sample_rate_hz: int, name: str) -> FloatArray:
    """Mixes (frames, channels) down to mono and resamples it to 16 kHz.

    Raises:
        CorpusError: no samples, or samples that are not finite.
    """
    if data.shape[0] == 0:
        raise CorpusError(f"{name}: holds no audio samples", mend="record or copy it again")
    mono = data.mean(axis=1, dtype=np.float32) if data.shape[1] > 1 else data[:, 0]
    if not np.isfinite(mono).all():
        raise CorpusError(f"{name}: holds samples that are not finite numbers", mend=_MEND)
    if sample_rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, sample_rate_hz, SAMPLE_RATE_HZ)
    return np.ascontiguousarray(mono, dtype=np.float32)


def pcm_sha256(samples: FloatArray) -> str:
    """The hash of the samples as 16-bit PCM: the identity of audio whose container may differ."""
    pcm = np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")
    return hashlib.sha256(pcm.tobytes()).hexdigest()
