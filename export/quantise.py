"""Weight-only quantisation: pure functions from float weights to codes and scales, and back.

Only weights are quantised, in blocks along a row. Activations are never scaled over a batch, so a
row's translation cannot depend on its neighbours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

# Beyond half precision's range of normal numbers scales are kept in full.
_SMALLEST_HALF = 2.0**-14
_LARGEST_HALF = 65504.0
# Clipping a block's extreme a little often lowers the squared error of all its other weights.
_SHRINK = tuple(np.linspace(0.7, 1.05, 15))


@dataclass(frozen=True)
class Blocks:
    """A matrix quantised in blocks along its rows.

    codes: uint8, (rows, blocks, block size), each less than 2**bits, zero at 2**(bits - 1).
    scales: float16 or float32, (rows, blocks).
    """

    codes: ByteArray
    scales: NDArray[np.floating]
    bits: int
    columns: int

    def dequantise(self) -> FloatArray:
        """The matrix that the codes stand for, (rows, columns)."""
        centred = self.codes.astype(np.float32) - 2 ** (self.bits - 1)
        values = centred * self.scales.astype(np.float32)[..., None]
        rows = values.shape[0]
        return np.ascontiguousarray(values.reshape(rows, -1)[:, : self.columns])

    def packed(self) -> ByteArray:
        """Codes as bytes, (rows, blocks, block size * bits / 8); of two 4-bit codes the first is low."""
        if self.bits == 8:
            return self.codes
        pairs: ByteArray = self.codes[..., 0::2] | (self.codes[..., 1::2] << np.uint8(4))
        return pairs

    @property
    def size_bytes(self) -> int:
        """Stored bytes of codes and scales."""
        return self.codes.size * self.bits // 8 + self.scales.nbytes


def quantise_blocks(weight: FloatArray, bits: int, block_size: int, search: bool = True) -> Blocks:
    """Symmetric round-to-nearest in blocks of a row.

    Args:
        weight: (rows, columns); the last block of a row is filled up with zeros.
        bits: 4 or 8.
        search: tries several scales a block and keeps the one with the least squared error,
            instead of the one that just holds the block's extreme.
    """
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), dtype=np.float32)
    padded[:, :columns] = weight
    values = padded.reshape(rows, blocks, block_size)
    half = 2 ** (bits - 1)
    largest, smallest = values.max(axis=-1), values.min(axis=-1)
    # The code range reaches one step further below zero: the extreme goes there, by a scale's sign.
    extreme = np.where(largest > -smallest, largest, smallest)
    scales = _storable(-extreme / half)
    if search and bits < 8:
        scales = _best_scales(values, scales, half)
    return Blocks(_encode(values, scales, half), scales, bits, columns)


def _encode(values: FloatArray, scales: NDArray[np.floating], half: int) -> ByteArray:
    wide = scales.astype(np.float32)[..., None]
    steps = np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)
    return (np.clip(np.rint(steps), -half, half - 1) + half).astype(np.uint8)


def _best_scales(
    values: FloatArray, scales: NDArray[np.floating], half: int
) -> NDArray[np.floating]:
    best, least = scales, np.full(scales.shape, np.inf, dtype=np.float32)
    for shrink in _SHRINK:
        tried = (scales.astype(np.float32) * np.float32(shrink)).astype(scales.dtype)
        centred = _encode(values, tried, half).astype(np.float32) - half
        error = values - centred * tried.astype(np.float32)[..., None]
        squared = np.einsum("rbk,rbk->rb", error, error)
        better = squared < least
        best, least = np.where(better, tried, best), np.where(better, squared, least)
    return best


def _storable(scales: FloatArray) -> NDArray[np.floating]:
    """Scales in half precision, unless one lies outside of its range."""
    sizes = np.abs(scales[scales != 0])
    if sizes.size and (sizes.min() < _SMALLEST_HALF or sizes.max() > _LARGEST_HALF):
        return scales.astype(np.float32)
    return scales.astype(np.float16)


def fits_bfloat16(values: FloatArray) -> bool:
    """Whether every value survives a round trip through bfloat16."""
    return not bool((np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any())


def to_bfloat16(values: FloatArray) -> NDArray[np.uint16]:
    """The upper halves of float32 values that `fits_bfloat16`."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(halves: NDArray[np.uint16]) -> FloatArray:
    """Float32 values of bfloat16 bit patterns."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
