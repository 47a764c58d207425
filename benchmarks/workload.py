"""What the benches feed to models: controls that test whether a model listens, and clips to time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from halve.audio import SAMPLE_RATE_HZ
from halve.corpus import Corpus, Segment
from halve.errors import CorpusError

FloatArray = NDArray[np.float32]

_BLOCK = 8


def shuffled_partners(durations_s: Sequence[float], texts: Sequence[str]) -> list[int]:
    """For each segment, another one of like duration: a derangement that is the same in every run.

    Segments are put in order of duration and cut into blocks of neighbours; within a block each
    gets the audio of the next but k. The smallest k is taken that gives nobody a segment that says
    the same words, so that the control cannot translate correctly by accident.

    Args:
        durations_s: length of each segment.
        texts: what each segment says.

    Returns:
        partner index of each segment; never its own.

    Raises:
        CorpusError: fewer than two segments.
    """
    if len(durations_s) < 2:
        raise CorpusError(
            "The control with another segment's source got one segment",
            expected="at least 2 segments",
            mend="use --no-controls, or a split of more segments",
        )
    order = sorted(range(len(durations_s)), key=lambda i: (durations_s[i], i))
    partners = [0] * len(order)
    for block in _blocks(order):
        shift = _shift(block, texts)
        for place, index in enumerate(block):
            partners[index] = block[(place + shift) % len(block)]
    return partners


def _blocks(order: list[int]) -> list[list[int]]:
    blocks = [order[i : i + _BLOCK] for i in range(0, len(order), _BLOCK)]
    if len(blocks) > 1 and len(blocks[-1]) < 2:
        blocks[-2].extend(blocks.pop())
    return blocks


def _shift(block: list[int], texts: Sequence[str]) -> int:
    def same_words(shift: int) -> int:
        return sum(
            texts[index] == texts[block[(place + shift) % len(block)]]
            for place, index in enumerate(block)
        )

    return min(range(1, len(block)), key=lambda shift: (same_words(shift), shift))


def silence_like(audio: FloatArray) -> FloatArray:
    """Digital silence of the same length."""
    return np.zeros_like(audio)


@dataclass(frozen=True)
class Clip:
    """Audio to time models on."""

    name: str
    samples: FloatArray
    segments: tuple[str, ...]
    """Ids of the corpus segments it is made of."""

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.samples) / SAMPLE_RATE_HZ

    def write(self, folder: Path) -> Path:
        """Writes the clip as 16-bit WAV."""
        path = folder / f"{self.name}.wav"
        soundfile.write(str(path), self.samples, SAMPLE_RATE_HZ, subtype="PCM_16")
        return path


def short_clip(corpus: Corpus, segments: Sequence[Segment], duration_s: float) -> Clip:
    """The real segment whose length is nearest to `duration_s`."""
    best = min(segments, key=lambda s: (abs(s.duration_s - duration_s), s.id))
    return Clip("short", corpus.audio(best), (best.id,))


def long_clip(
    corpus: Corpus, segments: Sequence[Segment], duration_s: float, pause_s: float
) -> Clip:
    """Real segments in corpus order, joined with pauses, as near to `duration_s` as they come.

    A segment that would overshoot is passed over for a later one that fits, so the clip is never
    longer than `duration_s` unless the corpus holds only longer segments.
    """
    chosen: list[Segment] = []
    total_s = 0.0
    for segment in segments:
        grown_s = total_s + segment.duration_s + (pause_s if chosen else 0.0)
        if grown_s <= duration_s:
            chosen.append(segment)
            total_s = grown_s
        if total_s >= 0.97 * duration_s:
            break
    if not chosen:
        chosen = [min(segments, key=lambda s: (s.duration_s, s.id))]
    pause = np.zeros(round(pause_s * SAMPLE_RATE_HZ), dtype=np.float32)
    pieces: list[FloatArray] = []
    for segment in chosen:
        if pieces:
            pieces.append(pause)
        pieces.append(corpus.audio(segment))
    return Clip("long", np.concatenate(pieces), tuple(segment.id for segment in chosen))
