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
"""The largest of the codes; what is larger than a peak is cut to it."""
_SMALLEST = 1e-6
"""A channel that is always 0 has some scale, too."""


@dataclass(frozen=True)
class Peaks:
    """The largest magnitudes that calibration saw in a layer's cache, each (kv heads, head_dim)."""

    keys: FloatArray
    """Rotated, as they are kept."""
    values: FloatArray


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
        half = geometry.head_dim // 2
        keys = np.maximum(peaks.keys, _SMALLEST)
        pairs = np.maximum(keys[:, :half], keys[:, half:])
        # Around 1, so that what the factors become part of keeps its range.
        largest = float(np.exp(np.log(pairs).mean()))
        factors = np.concatenate([pairs, pairs], axis=1) / largest
        queries = factors.repeat(geometry.heads // geometry.kv_heads, axis=0)
        rows: list[FloatArray] = [
            queries.ravel(),
            (1 / factors).ravel(),
            np.ones(peaks.values.size, np.float32),
        ]
        return cls(
            key=largest / LARGEST,
            value=max(float(peaks.values.max()), _SMALLEST) / LARGEST,
            qkv_factors=np.concatenate(rows).astype(np.float32),
        )


def scales_of(peaks: Sequence[Peaks], geometry: Geometry) -> list[CacheScales]:
    """The scales of each layer."""
    return [CacheScales.of_layer(each, geometry) for each in peaks]
