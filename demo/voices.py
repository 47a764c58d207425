"""The voices of the demo corpus: named recipes for espeak-ng and flite, and the synthesis.

All chance (which voice, how fast, how high, how loud) is drawn from the seed and the segment's
id, so a segment sounds the same whatever else is built.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from halve.audio import SAMPLE_RATE_HZ

LOUDNESS_DBFS = (-27.0, -19.0)
PEAK = 0.95


@dataclass(frozen=True)
class Voice:
    """A recipe: speaker of an engine, with ranges from which each segment draws its own values."""

    name: str
    engine: str
    speaker: str
    pace: tuple[float, float]
    """espeak-ng: words a minute; flite: stretch of the durations."""
    pitch: tuple[float, float]
    """espeak-ng: 0 to 99; flite: factor on the fundamental frequency."""
    train_weight: float
    """Share of the training segments; 0 for the voices that only `test` has."""


_ESPEAK_PACE, _FLITE_PACE = (135.0, 180.0), (0.92, 1.15)

VOICES = (
    Voice("flite-slt", "flite", "slt", _FLITE_PACE, (0.95, 1.08), 0.19),
    Voice("flite-rms", "flite", "rms", _FLITE_PACE, (1.0, 1.0), 0.18),  # knows no other pitch
    Voice("flite-awb", "flite", "awb", _FLITE_PACE, (0.95, 1.08), 0.16),
    Voice("flite-slt-low", "flite", "slt", _FLITE_PACE, (0.80, 0.90), 0.06),
    Voice("flite-awb-high", "flite", "awb", _FLITE_PACE, (1.15, 1.30), 0.06),
    Voice("espeak-us", "espeak-ng", "en-us", _ESPEAK_PACE, (35.0, 60.0), 0.06),
    Voice("espeak-us-f2", "espeak-ng", "en-us+f2", _ESPEAK_PACE, (40.0, 65.0), 0.06),
    Voice("espeak-gb", "espeak-ng", "en-gb", _ESPEAK_PACE, (35.0, 60.0), 0.05),
    Voice("espeak-gb-rp-f3", "espeak-ng", "en-gb-x-rp+f3", _ESPEAK_PACE, (40.0, 65.0), 0.05),
    Voice("espeak-scotland-m3", "espeak-ng", "en-gb-scotland+m3", _ESPEAK_PACE, (35.0, 60.0), 0.05),
    Voice("espeak-nyc-m7", "espeak-ng", "en-us-nyc+m7", _ESPEAK_PACE, (30.0, 55.0), 0.04),
    Voice("espeak-gbclan-f4", "espeak-ng", "en-gb-x-gbclan+f4", _ESPEAK_PACE, (40.0, 65.0), 0.04),
    # Heard in test alone: another person's voice, wide and narrow band, and another accent.
    Voice("flite-kal16", "flite", "kal16", _FLITE_PACE, (1.0, 1.0), 0.0),
    Voice("flite-kal", "flite", "kal", _FLITE_PACE, (1.0, 1.0), 0.0),
    Voice("espeak-gbcwmd-m6", "espeak-ng", "en-gb-x-gbcwmd+m6", _ESPEAK_PACE, (35.0, 60.0), 0.0),
)
UNSEEN_SHARE_OF_TEST = 0.3


def choose_voice(segment_id: str, split: str, seed: int) -> Voice:
    """The voice of a segment; in `test` a part has voices that no other split has."""
    rng = random.Random(f"{seed}/voice/{segment_id}")
    unseen = [voice for voice in VOICES if voice.train_weight == 0]
    seen = [voice for voice in VOICES if voice.train_weight > 0]
    if split == "test" and rng.random() < UNSEEN_SHARE_OF_TEST:
        return rng.choice(unseen)
    return rng.choices(seen, [voice.train_weight for voice in seen])[0]


def command(voice: Voice, text: str, wav: Path, rng: random.Random) -> list[str]:
    """The command line that speaks `text` into `wav`."""
    pace, pitch = rng.uniform(*voice.pace), rng.uniform(*voice.pitch)
    if voice.engine == "espeak-ng":
        options = ["-v", voice.speaker, "-s", f"{pace:.0f}", "-p", f"{pitch:.0f}"]
        return ["espeak-ng", *options, "-w", str(wav), "--", text]
    options = ["-voice", voice.speaker, "--setf", f"duration_stretch={pace:.3f}"]
    if pitch != 1.0:
        options += ["--setf", f"f0_shift={pitch:.3f}"]
    return ["flite", *options, "-t", text, "-o", str(wav)]


def speak(text: str, voice: Voice, segment_id: str, seed: int) -> npt.NDArray[np.float32]:
    """`text` as 16 kHz mono samples (frames,) in [-1, 1], at a loudness drawn for the segment.

    Raises subprocess.CalledProcessError if the engine fails, ValueError if it says nothing.
    """
    rng = random.Random(f"{seed}/speech/{segment_id}")
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        subprocess.run(command(voice, text, wav, rng), check=True, capture_output=True)
        samples, rate_hz = soundfile.read(wav, dtype="float64")
    if samples.size < rate_hz // 4:
        raise ValueError(f"{voice.name} said nothing for {text!r}")
    if rate_hz != SAMPLE_RATE_HZ:
        samples = soxr.resample(samples, rate_hz, SAMPLE_RATE_HZ)
    return set_loudness(samples, rng.uniform(*LOUDNESS_DBFS))


def set_loudness(samples: npt.NDArray[np.float64], dbfs: float) -> npt.NDArray[np.float32]:
    """Samples scaled to the given root mean square, less where the peak would pass 0.95.

    The result is rounded to 16 bits, so that the last digits of a sum do not reach the codec.
    """
    level = float(np.sqrt(np.mean(np.square(samples))))
    gain = min(10 ** (dbfs / 20) / level, PEAK / float(np.max(np.abs(samples))))
    return (np.rint(samples * gain * 32767.0) / 32768.0).astype(np.float32)
