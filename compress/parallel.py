"""Training on several devices at once: every process has the model and computes its share of each batch.

Processes are started by `accelerate launch` (or torchrun), one a GPU, all with the same command. The main one
(rank 0) does what a lone process does; the others follow it: they compute gradients of their sequences,
take the same steps, and write nothing. With one process nothing of this runs.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from halve import artefact, partials
from halve.artefact import Artefact, Draft
from halve.errors import MissingExtraError

Made = TypeVar("Made")

PATIENCE = timedelta(days=7)
"""How long processes wait for one another: the main one encodes and scores alone, for hours with much audio.

A process that dies takes the others with it all the same: the launcher ends them."""


@dataclass(frozen=True)
class Team:
    """The processes that train together."""

    rank: int = 0
    size: int = 1
    device: str | None = None
    """The device of this process; None leaves the choice to the settings."""

    @property
    def is_main(self) -> bool:
        """Whether this process keeps the record."""
        return self.rank == 0

    def share(self, sequences: Sequence[Any]) -> Sequence[Any]:
        """This process's part of a batch; batches are sorted by length, so that parts are of like size."""
        return sequences[self.rank :: self.size]

    def agree(self, decision: bool) -> bool:
        """What the main process decides."""
        if self.size == 1:
            return decision
        flag = torch.tensor([int(decision)], device=self.device)
        torch.distributed.broadcast(flag, 0)
        return bool(flag.item())

    def same(self, value: float) -> float:
        """The main process's value."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(held, 0)
        return float(held.item())

    def sum(self, loss: float, gradients: list[Tensor | None], like: Sequence[Tensor]) -> float:
        """Adds up losses and, in place, gradients over all processes; one that some lack counts as zero there."""
        if self.size == 1:
            return loss
        there = torch.tensor([float(one is not None) for one in gradients], device=self.device)
        torch.distributed.all_reduce(there)
        for place, weight in enumerate(like):
            gradient = gradients[place]
            # Nobody's: the optimiser leaves the weight alone, as with one process.
            if not there[place]:
                continue
            if gradient is None:
                gradient = torch.zeros_like(weight)
            torch.distributed.all_reduce(gradient)
            gradients[place] = gradient
        total = torch.tensor([loss], dtype=torch.float32, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total.item())

    def main_first(self, make: Callable[[], Made]) -> Made:
        """Makes something that leaves files: the main process first, the others find them there."""
        if not self.is_main:
            self.wait()
        made = make()
        if self.is_main:
            self.wait()
        return made

    def wait(self) -> None:
        """Goes on when all processes have come here."""
        if self.size > 1:
            torch.distributed.barrier()


def team(device: str) -> Team:
    """The team that this process was started in; a lone process is one too.

    Args:
        device: what the settings say: with "cpu" the team trains on CPUs even where there are GPUs.

    Raises:
        MissingExtraError: started by `accelerate launch`, but accelerate is not installed here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    try:
        from accelerate import PartialState
    except ImportError:
        raise MissingExtraError("accelerate", "train") from None
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return Team(state.process_index, state.num_processes, str(state.device))


@contextmanager
def writing(
    team: Team,
    out: Path,
    kind: str,
    recipe: Mapping[str, Any],
    seed: int,
    parents: Mapping[str, Path],
) -> Iterator[Draft]:
    """`artefact.writing` of the main process; the others get the same draft, to read from alone."""
    if not team.is_main:
        team.wait()
        yield Draft(partials.partial_path(out), resumed=False)
        return
    with artefact.writing(out, kind, recipe, seed, parents) as draft:
        team.wait()
        yield draft
    team.wait()


def published(team: Team, out: Path, kind: str) -> Artefact:
    """What the main process has published, for the others."""
    team.wait()
    return artefact.read(out, kind)
