"""Checkpoints of a training run: directories that appear whole or not at all."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

from halve.json_files import write_json

KEPT = 2
_TENSORS, _FACTS = "state.safetensors", "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class RunState:
    """Where a run stands, beside its weights. JSON keeps floats exactly."""

    step: int = 0
    elapsed_s: float = 0.0
    loss_sum: float = 0.0
    """Sum of the steps' losses since the last record of the history."""
    loss_steps: int = 0
    best_score: float | None = None
    best_step: int | None = None
    since_best: int = 0
    """Scores in a row that were no better than the best."""
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(
    folder: Path, state: RunState, weights: dict[str, Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint beside its place, renames it, then lets old ones go."""
    name = f"step-{state.step:08d}"
    draft = folder / f".{name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {f"weight/{key}": value.detach().contiguous() for key, value in weights.items()}
    for key, value in weights.items():
        moments = optimizer.state.get(value, {})
        tensors |= {f"{name}/{key}": moments[name] for name in _MOMENTS if name in moments}
        # A weight that some step had no gradient for (a layer that was skipped) has taken fewer steps than the run.
        if "step" in moments and int(moments["step"]) != state.step:
            tensors[f"step/{key}"] = moments["step"].detach().reshape(1)
    save_tensors(draft / _TENSORS, tensors)
    write_json(draft / _FACTS, asdict(state))
    place = folder / name
    if place.exists():  # the same step again, with a score added
        aside = folder / f".{name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
    draft.rename(place)
    _sync(folder)
    _tidy(folder, state)


def load_checkpoint(
    folder: Path, weights: dict[str, Parameter], optimizer: torch.optim.Optimizer
) -> RunState:
    """Puts the newest whole checkpoint into the weights and the optimiser; a fresh state if there is none."""
    for place in sorted(folder.glob("step-*"), reverse=True):
        try:
            facts = json.loads((place / _FACTS).read_text(encoding="utf8"))
            tensors = load_file(place / _TENSORS)
        except (OSError, ValueError, SafetensorError):
            continue  # damaged by a power cut; the one before it is whole
        state = RunState(**facts)
        _restore(tensors, state.step, weights, optimizer)
        return state
    return RunState()


def _restore(
    tensors: dict[str, Tensor],
    step: int,
    weights: dict[str, Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.copy_(tensors[f"weight/{key}"])
            if f"{_MOMENTS[0]}/{key}" in tensors:
                taken = float(tensors.get(f"step/{key}", torch.tensor([float(step)])))
                optimizer.state[parameter] = {
                    "step": torch.tensor(taken, device=parameter.device),
                    **{name: tensors[f"{name}/{key}"].to(parameter.device) for name in _MOMENTS},
                }


def save_best(folder: Path, step: int, weights: dict[str, Parameter]) -> None:
    """Keeps the weights of a step that scored best; the checkpoint that names the step comes after."""
    tensors = {key: value.detach().contiguous() for key, value in weights.items()}
    save_tensors(_best(folder, step), tensors)


def load_best(folder: Path, step: int, weights: dict[str, Parameter]) -> None:
    """Puts the weights of the step that scored best back."""
    tensors = load_file(_best(folder, step))
    with torch.no_grad():
        for key, parameter in weights.items():
            parameter.copy_(tensors[key])


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file in one rename, on disk before it has its name."""
    draft = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, draft)
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)


def _best(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"


def _tidy(folder: Path, state: RunState) -> None:
    """Lets go of checkpoints beyond the newest, of old bests, and of what a kill left half-written."""
    places = sorted(folder.glob("step-*"))
    for place in [*places[:-KEPT], *folder.glob(".step-*")]:
        shutil.rmtree(place, ignore_errors=True)
    named = {state.best_step}
    for place in places[-KEPT:]:
        try:
            named.add(json.loads((place / _FACTS).read_text(encoding="utf8"))["best_step"])
        except (OSError, ValueError):
            continue  # damaged, and not the newest
    for best in folder.glob("best-*.safetensors"):
        if int(best.stem.removeprefix("best-")) not in named:
            best.unlink()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
