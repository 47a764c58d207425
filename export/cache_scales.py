"""Keys and values in 8 bits: the scales of a layer's cache, and what evens its channels out.

onnxruntime's attention is fastest with a single scale for all keys of a layer, and keys of real models have channels a
hundred times as large as others. Rotary embeddings turn channels c and c + head_dim / 2 into each other, so that a
factor that both share may move from keys to queries: scores stay what they are, and every pair of channels fills the
same 8 bits (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, does so between activations and weights). Here it costs
nothing: the factors become part of the scales that the weights of queries and keys have anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.geometry import Geometry

FloatArray = NDArray[np.float32]

LARGEST = 127
"""The largest of the codes; what is larger is cut to it."""
HEADROOM = 1.05
"""Peaks are the student's: its package, whose weights are rounded, goes a little beyond."""
_LEAST_SHARE = 1e-3
"""Channels smaller than this share of a layer's largest are not made larger than this: some are always 0."""


@dataclass(frozen=True)
class Peaks:
    """The largest magnitudes that calibration saw in a layer's cache."""

    keys: FloatArray
    """Of each pair of channels that rotary embeddings turn into each other, (kv heads, head_dim / 2): the length of the
    two together, which a channel may reach by itself at another position."""
    values: FloatArray
    """(kv heads, head_dim)."""

    @classmethod
    def of(cls, keys: FloatArray, values: FloatArray) -> "Peaks":
        """Of keys and values, each (kv heads, positions, head_dim)."""
        first, second = np.split(keys, 2, axis=-1)
        return cls(np.hypot(first, second).max(1), np.abs(values).max(1))

    def __or__(self, other: "Peaks") -> "Peaks":
        return Peaks(np.maximum(self.keys, other.keys), np.maximum(self.values, other.values))


@dataclass(frozen=True)
class CacheScales:
    """What one layer's graph needs for keys and values in 8 bits."""

    key: float
    value: float
    """What a code of 1 stands for."""
    qkv_factors: FloatArray
    """What rows of queries, keys and values, one after the other, are multiplied by."""

    @classmethod
    def of_layer(cls, peaks: Peaks, geometry: Geometry) -> "CacheScales":
        """The scales under which no peak is cut."""
        least = float(np.finfo(np.float32).tiny)
        pairs = np.maximum(peaks.keys, max(_LEAST_SHARE * float(peaks.keys.max()), least))
        # Around 1, so that what the factors become part of keeps its range.
        typical = np.float32(np.exp(np.log(pairs).mean()))
        factors = (np.concatenate([pairs, pairs], axis=1) / typical).astype(np.float32)
        queries = factors.repeat(geometry.heads // geometry.kv_heads, axis=0)
        ones = np.ones(peaks.values.size, np.float32)
        rows = np.concatenate([queries.ravel(), np.float32(1) / factors.ravel(), ones])
        return cls(
            key=HEADROOM * float(typical) / LARGEST,
            value=HEADROOM * max(float(peaks.values.max()), least) / LARGEST,
            qkv_factors=rows.astype(np.float32),
        )


def scales_of(peaks: Sequence[Peaks], geometry: Geometry) -> list[CacheScales]:
    """The scales of each layer."""
    return [CacheScales.of_layer(each, geometry) for each in peaks]
