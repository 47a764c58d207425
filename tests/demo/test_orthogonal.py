"""Muon in float32 takes the steps that torch's takes, but for bfloat16's rounding."""

from collections.abc import Iterator

import pytest
import torch
from torch.optim import _muon

from demo.orthogonal import orthogonalise, use_float32


@pytest.fixture
def torch_s_own() -> Iterator[None]:
    before = _muon._zeropower_via_newtonschulz
    yield
    _muon._zeropower_via_newtonschulz = before


@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (96, 96)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    settings = (3.4445, -4.775, 2.0315), 5, 1e-7
    found = orthogonalise(update, *settings)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.5
    left, _, right = torch.linalg.svd(update, full_matrices=False)
    turned = left.T @ found @ right.T
    assert (turned - torch.diag(turned.diagonal())).abs().max() < 1e-3
    theirs = _muon._zeropower_via_newtonschulz(update, *settings).float()
    assert (found - theirs).abs().mean() < 0.03 * found.abs().mean()


def test_optimizers_take_it(torch_s_own: None) -> None:
    steps = []
    for replaced in (False, True):
        if replaced:
            use_float32()
        weight = torch.nn.Parameter(torch.eye(32, 64))
        weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        torch.optim.Muon([weight], lr=0.02, weight_decay=0.0).step()
        steps.append(weight.detach() - torch.eye(32, 64))
    assert not torch.equal(*steps)
    assert torch.allclose(*steps, atol=0.1 * steps[0].abs().max().item())
