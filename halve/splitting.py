"""Long audio, cut at pauses into stretches that the model can hear.

Energy is measured in frames of 20 ms and smoothed over 200 ms, so that the closure of a stop
consonant is not taken for a pause. A stretch is cut in the quietest place of its second half; of
places that are about equally quiet (within 3 dB) the longest pause wins, and of equal ones the
latest. Every sample lands in exactly one stretch: nothing is dropped and nothing is heard twice.
Where there is no pause at all, the cut falls in the quietest moment of speech.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halve.audio import SAMPLE_RATE_HZ

FloatArray = NDArray[np.float32]

FRAME = SAMPLE_RATE_HZ // 50
"""Samples of one energy frame: 20 ms."""
SMOOTHING = 10
"""Frames that energy is averaged over: 200 ms."""
QUIET_MARGIN_DB = 3.0
"""Places this close to the quietest count as equally quiet."""
SILENCE_PEAK = 1e-3
"""A stretch that never exceeds this (-60 dB of full scale) holds no speech."""
FLOOR_DB = -100.0


@dataclass(frozen=True, eq=False)
class Stretch:
    """A part of a recording that is translated at once."""

    samples: FloatArray
    """Shape (samples,), 16 kHz mono."""
    start_s: float

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLE_RATE_HZ

    @property
    def end_s(self) -> float:
        return self.start_s + self.duration_s

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to hear in it."""
        return not len(self.samples) or float(np.abs(self.samples).max()) < SILENCE_PEAK


def energy_db(samples: FloatArray) -> NDArray[np.float64]:
    """Smoothed energy of each whole 20 ms frame, in dB of full scale, shape (frames,)."""
    frames = len(samples) // FRAME
    if not frames:
        return np.zeros(0)
    blocks = samples[: frames * FRAME].reshape(frames, FRAME).astype(np.float64)
    power = np.mean(blocks**2, axis=1)
    kernel = np.ones(min(SMOOTHING, frames)) / min(SMOOTHING, frames)
    # Repeating the edges keeps the ends of the window from looking quiet.
    left = len(kernel) // 2
    padded = np.pad(power, (left, len(kernel) - 1 - left), mode="edge")
    smoothed = np.convolve(padded, kernel, mode="valid")
    decibels: NDArray[np.float64] = 10 * np.log10(np.maximum(smoothed, 1e-12))
    return np.maximum(decibels, FLOOR_DB)


def cut_point(samples: FloatArray) -> int:
    """Where to cut a full window, in samples; in its second half and on a frame's middle.

    `samples` is one window, shape (samples,), with more audio after it.
    """
    energy = energy_db(samples)
    first = len(energy) // 2
    search = energy[first:]
    if not len(search):
        return len(samples)
    quiet = search <= search.min() + QUIET_MARGIN_DB
    start, length = _longest_run(quiet)
    return min(len(samples), int((first + start + length / 2) * FRAME))


def _longest_run(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """(start, length) of the longest run of True; of equal ones the latest. One must be True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    best = len(lengths) - 1 - int(np.argmax(lengths[::-1]))
    return int(starts[best]), int(lengths[best])


def stretches(blocks: Iterable[FloatArray], window_s: float) -> Generator[Stretch]:
    """Cuts audio that arrives in blocks into stretches of at most `window_s` seconds.

    Holds at most a window and a block in memory. Audio no longer than a window comes back whole.
    """
    window = max(FRAME, int(window_s * SAMPLE_RATE_HZ))
    held = np.zeros(0, dtype=np.float32)
    position = 0
    for block in blocks:
        held = np.concatenate((held, block)) if len(held) else block
        while len(held) > window:
            cut = max(1, cut_point(held[:window]))
            yield Stretch(held[:cut].copy(), position / SAMPLE_RATE_HZ)
            position += cut
            held = held[cut:]
    if len(held):
        yield Stretch(held, position / SAMPLE_RATE_HZ)
