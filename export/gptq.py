"""GPTQ: rounds a weight column by column, and lets the columns not yet rounded make up for each error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
in the form with a Cholesky factor. The blocks' grids are chosen beforehand, so that columns can be taken
in the order of their importance and a block still has one scale.
"""

import numpy as np
from numpy.typing import NDArray

from export.quantise import Blocks, FloatArray, Grid, fit_grid, in_blocks

Moments = NDArray[np.float64]
"""Sum of x x^T over what a layer reads, (columns, columns)."""

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean."""
_LAZY_COLUMNS = 128


def gptq_blocks(
    weight: FloatArray,
    moments: Moments,
    bits: int,
    block_size: int,
    *,
    zero_point: bool = False,
    damping: float = DAMPING,
) -> Blocks:
    """Quantises a weight so that what it computes, rather than the weight, changes least.

    Args:
        weight: (rows, columns).
        moments: of the layer's inputs; columns that were never read are rounded to nearest.
        bits, block_size, zero_point: as in `quantise_blocks`.

    Raises:
        numpy.linalg.LinAlgError: moments that are no covariance (not finite).
    """
    columns = weight.shape[1]
    values = in_blocks(weight, block_size)
    importance = np.zeros(values.shape[1] * block_size, np.float32)
    importance[:columns] = np.diag(moments) / max(float(np.diag(moments).mean()), 1e-30) + 1e-6
    grid = fit_grid(
        values,
        bits,
        zero_point=zero_point,
        importance=importance.reshape(values.shape[1:]),
    )
    order = np.argsort(-np.diag(moments), kind="stable")
    rounded = np.zeros((weight.shape[0], values.shape[1] * block_size), np.float32)
    rounded[:, :columns] = _compensated(weight, moments, grid, block_size, order, damping)
    codes = grid.encode(rounded.reshape(values.shape))
    return Blocks(codes, grid.scales, bits, columns, grid.zeros)


def _compensated(
    weight: FloatArray,
    moments: Moments,
    grid: Grid,
    block_size: int,
    order: NDArray[np.intp],
    damping: float,
) -> FloatArray:
    """The rounded weight, (rows, columns), its columns taken in `order`."""
    factor = _inverse_factor(moments[np.ix_(order, order)], damping)
    left = weight[:, order].astype(np.float32)
    done = np.empty_like(left)
    for start in range(0, len(order), _LAZY_COLUMNS):
        # Errors reach the columns of this stretch at once, the others when it is done.
        stop = min(start + _LAZY_COLUMNS, len(order))
        errors = np.empty((len(left), stop - start), np.float32)
        for place in range(start, stop):
            block = int(order[place]) // block_size
            column = left[:, place, None, None]
            near = grid.columns(block, block + 1)
            done[:, place] = near.decode(near.encode(column))[:, 0, 0]
            error = (left[:, place] - done[:, place]) / factor[place, place]
            left[:, place:stop] -= np.outer(error, factor[place, place:stop])
            errors[:, place - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = np.empty_like(done)
    restored[:, order] = done
    return restored


def _inverse_factor(moments: Moments, damping: float) -> FloatArray:
    """Upper Cholesky factor of the damped moments' inverse, (columns, columns)."""
    damped = moments.copy()
    diagonal = np.diagonal(damped)
    ground = max(float(diagonal.mean()), 1e-30)
    damped[np.diag_indices_from(damped)] += np.where(diagonal == 0, ground, damping * ground)
    inverse = np.linalg.inv(damped)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return np.ascontiguousarray(factor, dtype=np.float32)
