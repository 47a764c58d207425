"""Audio that several models hear one after the other: decoded on all cores, and once where memory allows."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from benchmarks.workload import FloatArray
from halve import environment
from halve.corpus import Corpus, Segment
from halve.families import Source

KEPT_BYTES = 1 << 28
"""Decoded audio that is kept: over an hour of it."""


class Heard:
    """The audio of some segments, by their places."""

    def __init__(self, corpus: Corpus, segments: Sequence[Segment]) -> None:
        self._corpus, self._segments = corpus, segments
        self._kept: dict[int, FloatArray] = {}
        self._left_bytes = KEPT_BYTES
        self._lock = Lock()

    def __call__(self, place: int) -> FloatArray:
        """One segment's samples."""
        with self._lock:
            if place in self._kept:
                return self._kept[place]
        samples = self._corpus.audio(self._segments[place])
        with self._lock:
            if place not in self._kept and samples.nbytes <= self._left_bytes:
                self._kept[place] = samples
                self._left_bytes -= samples.nbytes
        return samples


def read_all(source: Callable[[int], Source], places: Sequence[int]) -> list[Source]:
    """The sources at these places, read side by side."""
    with ThreadPoolExecutor(environment.cores()) as pool:
        return list(pool.map(source, places))
