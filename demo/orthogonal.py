"""Muon's orthogonal updates in float32, for processors without units for bfloat16.

torch's Muon turns every update into bfloat16, whatever computes it. Without units for that, this took five sixths of
a step of the warm-up.
"""

from torch import Tensor
from torch.optim import _muon


def orthogonalise(
    update: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """A matrix with the singular vectors of `update` and singular values near one: (rows, columns).

    Newton and Schulz's iteration as Muon has it (K. Jordan and others, 2024), in the type of `update`.
    """
    linear, cubic, quintic = coefficients
    upright = update.shape[0] > update.shape[1]
    found = update.T if upright else update
    found = found / found.norm().clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.T
        found = linear * found + (cubic * gram + quintic * gram @ gram) @ found
    return found.T if upright else found


def use_float32() -> None:
    """Has this process's Muon optimizers take `orthogonalise` in place of torch's own."""
    _muon._zeropower_via_newtonschulz = orthogonalise
