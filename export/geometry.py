"""The sizes of a decoder, as a package records them and its runtime needs them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder, as a package records them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    max_positions: int
    rotary_frequencies: tuple[float, ...]
    """Radians a position of each pair of channels, (head_dim / 2,)."""


def rotary_table(geometry: Geometry, positions: int) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines of `positions` positions, each (positions, head_dim / 2)."""
    frequencies = np.array(geometry.rotary_frequencies, dtype=np.float32)
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)
