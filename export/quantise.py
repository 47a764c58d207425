"""Weight-only quantisation: pure functions from float weights to codes and scales, and back.

Only weights are quantised, in blocks along a row. Activations are never scaled over a batch, so a
row's translation cannot depend on its neighbours.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]
Scales = NDArray[np.floating]

# Beyond half precision's range of normal numbers scales are kept in full.
_SMALLEST_HALF = 2.0**-14
_LARGEST_HALF = 65504.0
# Clipping a block's extreme a little often lowers the squared error of all its other weights.
_SHRINK = tuple(np.linspace(0.7, 1.05, 15))


@dataclass(frozen=True)
class Blocks:
    """A matrix quantised in blocks along its rows.

    codes: uint8, (rows, blocks, block size), each less than 2**bits.
    scales: float16 or float32, (rows, blocks).
    zeros: uint8, (rows, blocks), the code that stands for 0; 2**(bits - 1) where None.
    """

    codes: ByteArray
    scales: Scales
    bits: int
    columns: int
    zeros: ByteArray | None = None

    def dequantise(self) -> FloatArray:
        """The matrix that the codes stand for, (rows, columns)."""
        values = _decode(self.codes, self.scales, _zeros(self.zeros, self.bits))
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, : self.columns])

    def times(self, factors: FloatArray) -> "Blocks":
        """The matrix with each row multiplied by a factor, (rows,), which its scales take in."""
        return replace(self, scales=_storable(self.scales.astype(np.float32) * factors[:, None]))

    def packed(self) -> ByteArray:
        """Codes as bytes, (rows, blocks, block size * bits / 8); of two 4-bit codes the first is low."""
        return self.codes if self.bits == 8 else _pairs(self.codes)

    def packed_zeros(self) -> ByteArray | None:
        """Zero codes as bytes, (rows, blocks * bits / 8 rounded up)."""
        if self.zeros is None or self.bits == 8:
            return self.zeros
        even = np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2)))
        return _pairs(even)

    @property
    def size_bytes(self) -> int:
        """Stored bytes of codes, scales and zeros."""
        zeros = self.packed_zeros()
        codes = self.codes.size * self.bits // 8
        return codes + self.scales.nbytes + (0 if zeros is None else zeros.nbytes)


def _pairs(codes: ByteArray) -> ByteArray:
    pairs: ByteArray = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return pairs


@dataclass(frozen=True)
class Grid:
    """Where the codes of each block lie: scales and zeros as in `Blocks`."""

    scales: Scales
    bits: int
    zeros: ByteArray | None = None

    def encode(self, values: FloatArray) -> ByteArray:
        """The nearest codes of values, (rows, blocks, block size)."""
        return _encode(values, self.scales, _zeros(self.zeros, self.bits), self.bits)

    def decode(self, codes: ByteArray) -> FloatArray:
        """The values of codes, (rows, blocks, block size)."""
        return _decode(codes, self.scales, _zeros(self.zeros, self.bits))

    def columns(self, first: int, last: int) -> "Grid":
        """The grid of some of the blocks of each row."""
        zeros = None if self.zeros is None else self.zeros[:, first:last]
        return Grid(self.scales[:, first:last], self.bits, zeros)


def quantise_blocks(
    weight: FloatArray,
    bits: int,
    block_size: int,
    search: bool = True,
    zero_point: bool = False,
) -> Blocks:
    """Round-to-nearest in blocks of a row.

    Args:
        weight: (rows, columns); the last block of a row is filled up with zeros.
        bits: 4 or 8.
        search, zero_point: see `fit_grid`.
    """
    values = in_blocks(weight, block_size)
    grid = fit_grid(values, bits, search=search, zero_point=zero_point)
    return Blocks(grid.encode(values), grid.scales, bits, weight.shape[1], grid.zeros)


def in_blocks(weight: FloatArray, block_size: int) -> FloatArray:
    """(rows, columns) as (rows, blocks, block size), filled up with zeros."""
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), dtype=np.float32)
    padded[:, :columns] = weight
    return padded.reshape(rows, blocks, block_size)


def fit_grid(
    values: FloatArray,
    bits: int,
    *,
    search: bool = True,
    zero_point: bool = False,
    importance: FloatArray | None = None,
) -> Grid:
    """Chooses a scale for each block.

    Args:
        values: (rows, blocks, block size).
        search: of 4 bits, tries several scales a block and keeps the one with the least squared error,
            instead of the one that just holds the block's extreme.
        zero_point: gives each block a code for 0, so that a lopsided block wastes no codes.
        importance: weights of the squared errors, (blocks, block size); equal where None.
    """
    search = search and bits < 8
    grid = _lopsided(values, bits) if zero_point else _symmetric(values, bits)
    if not search:
        return grid
    weights = np.ones(values.shape[1:], np.float32) if importance is None else importance
    best = _Best(values, weights, grid)
    for shrink in _SHRINK:
        for shift in (-1, 0, 1) if zero_point else (0,):
            best.offer(_shrunk(grid, shrink, shift))
    best.refine()
    return best.grid


def _symmetric(values: FloatArray, bits: int) -> Grid:
    largest, smallest = values.max(axis=-1), values.min(axis=-1)
    # The code range reaches one step further below zero: the extreme goes there, by a scale's sign.
    extreme = np.where(largest > -smallest, largest, smallest)
    return Grid(_storable(-extreme / 2 ** (bits - 1)), bits)


def _lopsided(values: FloatArray, bits: int) -> Grid:
    largest = np.maximum(values.max(axis=-1), 0)
    smallest = np.minimum(values.min(axis=-1), 0)
    scales = _storable((largest - smallest) / (2**bits - 1))
    wide = scales.astype(np.float32)
    zeros = np.divide(-smallest, wide, out=np.zeros_like(smallest), where=wide != 0)
    return Grid(scales, bits, np.clip(np.rint(zeros), 0, 2**bits - 1).astype(np.uint8))


def _shrunk(grid: Grid, shrink: float, shift: int) -> Grid:
    scales = (grid.scales.astype(np.float32) * np.float32(shrink)).astype(grid.scales.dtype)
    if grid.zeros is None:
        return Grid(scales, grid.bits)
    zeros = np.clip(grid.zeros.astype(np.int16) + shift, 0, 2**grid.bits - 1)
    return Grid(scales, grid.bits, zeros.astype(np.uint8))


class _Best:
    """The best grid so far, block by block."""

    def __init__(self, values: FloatArray, weights: FloatArray, grid: Grid) -> None:
        self._values, self._weights, self.grid = values, weights, grid
        self._least = np.full(grid.scales.shape, np.inf, dtype=np.float32)

    def offer(self, tried: Grid) -> None:
        error = self._values - tried.decode(tried.encode(self._values))
        squared = np.einsum("rbk,rbk,bk->rb", error, error, self._weights, optimize=True)
        better = squared < self._least
        self._least = np.where(better, squared, self._least)
        zeros = self.grid.zeros
        if zeros is not None and tried.zeros is not None:
            zeros = np.where(better, tried.zeros, zeros)
        scales = np.where(better, tried.scales, self.grid.scales)
        self.grid = Grid(scales, tried.bits, zeros)

    def refine(self, rounds: int = 2) -> None:
        """Offers the scale that fits the chosen codes best, by least squares."""
        for _ in range(rounds):
            grid = self.grid
            zeros = _zeros(grid.zeros, grid.bits)
            centred = grid.encode(self._values).astype(np.float32) - zeros
            weighted = centred * self._weights
            above = np.einsum("rbk,rbk->rb", weighted, self._values)
            below = np.einsum("rbk,rbk->rb", weighted, centred)
            fitted = np.divide(above, below, out=grid.scales.astype(np.float32), where=below > 0)
            self.offer(Grid(fitted.astype(grid.scales.dtype), grid.bits, grid.zeros))


def _zeros(zeros: ByteArray | None, bits: int) -> FloatArray:
    """Zero codes ready to be taken from codes, (rows, blocks, 1) or one for all."""
    if zeros is None:
        return np.array(2 ** (bits - 1), dtype=np.float32)
    return zeros.astype(np.float32)[..., None]


def _encode(values: FloatArray, scales: Scales, zeros: FloatArray, bits: int) -> ByteArray:
    wide = scales.astype(np.float32)[..., None]
    steps = np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)
    return np.clip(np.rint(steps) + zeros, 0, 2**bits - 1).astype(np.uint8)


def _decode(codes: ByteArray, scales: Scales, zeros: FloatArray) -> FloatArray:
    values: FloatArray = (codes.astype(np.float32) - zeros) * scales.astype(np.float32)[..., None]
    return values


def _storable(scales: FloatArray) -> Scales:
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
