"""What a soak sends: real speech in many containers, and files made to do harm."""

import io
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.workload import FloatArray
from halve.audio import SAMPLE_RATE_HZ, read_audio
from halve.corpus import Corpus, Segment
from halve.environment import find_ffmpeg

CONTAINERS: dict[str, dict[str, str]] = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
}
FLOATS = {"format": "WAV", "subtype": "FLOAT"}
BY_FFMPEG: Mapping[str, Sequence[str]] = {"m4a": ("-c:a", "aac"), "webm": ("-c:a", "libopus")}


@dataclass(frozen=True, eq=False)
class Sound:
    """A file to send, and what is heard in it."""

    name: str
    content: bytes
    samples: FloatArray
    """Shape (samples,), 16 kHz mono, decoded from `content`."""

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ


def sounds(corpus: Corpus, segments: Sequence[Segment]) -> list[Sound]:
    """Each segment in each container that this machine can write."""
    found = []
    for segment in segments:
        samples = corpus.audio(segment)
        for kind in (*CONTAINERS, *(BY_FFMPEG if find_ffmpeg() else ())):
            found.append(_sound(f"{segment.id}.{kind}", samples, kind))
    return found


def long_sounds(
    corpus: Corpus, segments: Sequence[Segment], duration_s: float, count: int
) -> list[Sound]:
    """Speech of at least `duration_s`: segments one after another with pauses of 0.4 s."""
    pause = np.zeros(round(0.4 * SAMPLE_RATE_HZ), np.float32)
    found, place = [], 0
    for number in range(count):
        parts: list[FloatArray] = []
        while sum(map(len, parts)) < duration_s * SAMPLE_RATE_HZ:
            parts += [corpus.audio(segments[place % len(segments)]), pause]
            place += 1
        found.append(_sound(f"long-{number}.flac", np.concatenate(parts), "flac"))
    return found


def _sound(name: str, samples: FloatArray, kind: str) -> Sound:
    if kind in CONTAINERS:
        content = encoded(samples, CONTAINERS[kind])
        return Sound(name, content, _heard(content))
    content = _by_ffmpeg(encoded(samples), kind)
    return Sound(name, content, _heard_by_ffmpeg(content))


def _heard(content: bytes) -> FloatArray:
    """As `halve translate` hears a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return read_audio(file.name)


def encoded(
    samples: FloatArray,
    container: Mapping[str, str] = CONTAINERS["wav"],
    rate_hz: int = SAMPLE_RATE_HZ,
) -> bytes:
    """Samples as a file; `container`: soundfile's format and subtype."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, **container)
    return file.getvalue()


def _by_ffmpeg(wav: bytes, kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out.{kind}"
        command = [str(find_ffmpeg()), "-v", "error", "-f", "wav", "-i", "pipe:0", *BY_FFMPEG[kind]]
        subprocess.run([*command, str(path)], input=wav, check=True)
        return path.read_bytes()


def _heard_by_ffmpeg(content: bytes) -> FloatArray:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [str(find_ffmpeg()), "-v", "error", "-i", file.name, "-map", "0:a:0", "-ac", "1"]
        command += ["-ar", str(SAMPLE_RATE_HZ), "-f", "f32le", "pipe:1"]
        data = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(data, "<f4").astype(np.float32)


def hostile_files(good: Sound) -> dict[str, bytes]:
    """Files that no server should choke on; each may be refused, some may be heard."""
    tone = good.samples[: 2 * SAMPLE_RATE_HZ]
    not_numbers = tone.copy()
    not_numbers[SAMPLE_RATE_HZ // 2 :: 97] = np.nan
    flac = encoded(tone, CONTAINERS["flac"])
    ogg = encoded(tone, CONTAINERS["ogg"])
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, 20_000, np.uint8).tobytes()
    return {
        "empty": b"",
        "text": b"This is a text, whatever its name says.\n" * 50,
        "noise after a flac magic": b"fLaC" + noise,
        "noise after an ogg magic": b"OggS" + noise,
        "noise after an mp3 magic": b"ID3\x04" + noise,
        "noise after an mp4 magic": b"\x00\x00\x00\x20ftypM4A " + noise,
        "noise after a webm magic": b"\x1a\x45\xdf\xa3" + noise,
        "flac cut in half": flac[: len(flac) // 2],
        "ogg cut in half": ogg[: len(ogg) // 2],
        "header without samples": encoded(tone)[:44],
        "wav that promises 2 GB": _wav_header(1, 16_000, 2**31) + bytes(4_000),
        "65,535 channels": _wav_header(65_535, 16_000, 4_000) + bytes(4_000),
        "2^31 channels": _au_header(2**31) + bytes(4_000),
        "1 Hz": _wav_header(1, 1, 4_000) + bytes(4_000),
        "not numbers": encoded(not_numbers, FLOATS),
        "absurdly loud": encoded(tone * 1e9, FLOATS),
        "bomb of silence": encoded(np.zeros(4_000 * 3_700, np.float32), CONTAINERS["flac"], 4_000),
    }


MAY_BE_HEARD = frozenset({"flac cut in half", "ogg cut in half", "wav that promises 2 GB"})
"""Hostile files that hold some audio."""


def _wav_header(channels: int, rate_hz: int, data_bytes: int) -> bytes:
    frame = min(65_535, 2 * channels)
    facts = struct.pack("<IHHIIHH", 16, 1, channels, rate_hz, rate_hz * frame, frame, 16)
    return b"RIFF\xff\xff\xff\xffWAVEfmt " + facts + b"data" + struct.pack("<I", data_bytes)


def _au_header(channels: int) -> bytes:
    return b".snd" + struct.pack(">IIIII", 24, 0xFFFFFFFF, 3, 16_000, channels)
