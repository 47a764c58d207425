"""Checkpoints give the optimiser back as it was."""

from pathlib import Path

import torch
from torch.nn import Parameter

from compress.checkpoints import RunState, load_checkpoint, save_checkpoint


def _made() -> tuple[dict[str, Parameter], torch.optim.AdamW]:
    weights = {name: Parameter(torch.ones(3)) for name in ("always", "skipped", "never")}
    return weights, torch.optim.AdamW(weights.values(), lr=0.1)


def _step(weights: dict[str, Parameter], optimizer: torch.optim.AdamW, number: int) -> None:
    for place, (name, weight) in enumerate(weights.items()):
        learns = name == "always" or (name == "skipped" and number % 2 == 0)
        weight.grad = torch.full((3,), 0.5 + place + number) if learns else None
    optimizer.step()


def test_a_weight_that_missed_steps_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    calm, calm_optimizer = _made()
    for number in range(6):
        _step(calm, calm_optimizer, number)
    first, first_optimizer = _made()
    for number in range(3):
        _step(first, first_optimizer, number)
    save_checkpoint(tmp_path, RunState(step=3), first, first_optimizer)
    again, optimizer = _made()
    state = load_checkpoint(tmp_path, again, optimizer)
    for number in range(state.step, 6):
        _step(again, optimizer, number)
    for name, weight in calm.items():
        assert torch.equal(again[name], weight), name
