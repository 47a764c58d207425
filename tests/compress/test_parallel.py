"""Two processes that train together do what one does; LoRA teaching writes a merged teacher."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress import loop, parallel
from compress.checkpoints import RunState
from compress.config import TeachConfig
from compress.parallel import Team
from compress.teach import run_teach
from halve import artefact
from halve.models import load_model

SETTINGS: dict[str, Any] = {
    "langs": ["de"],
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "float32",
    "select_segments": 2,
    "clip_norm": 1.0,
}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_take_the_steps_of_one(
    method: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    # Plain gradient descent would differ by rounding alone; Adam's first steps magnify it a little.
    adapter = {"rank": 4, "alpha": 8} if method == "lora" else {}
    config = TeachConfig.model_validate(SETTINGS | {"method": method, **adapter})
    run_teach(config, tiny_model, tiny_corpus, alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "pipeline.cli", "teach", "--model", str(tiny_model), "--corpus"]
    command += [str(tiny_corpus), "--lang", "de", "--out", str(together), "--method", method]
    command += [word for name, value in adapter.items() for word in (f"--{name}", str(value))]
    command += ["--epochs", "2", "--batch-size", "4"]
    command += ["--learning-rate", "1e-3", "--precision", "float32", "--select-segments", "2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    histories = [
        [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
        for place in (alone, together)
    ]
    assert [line["step"] for line in histories[0]] == [line["step"] for line in histories[1]]
    losses = [[line["loss"] for line in history if "loss" in line] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]
    assert artefact.verify(together) == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_lora_teaching_merges_into_an_ordinary_directory(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TeachConfig.model_validate(
        SETTINGS
        | {"method": "lora", "rank": 4, "alpha": 8, "weights": "bfloat16", "precision": "auto"}
    )
    run_teach(config, tiny_model, tiny_corpus, tmp_path / "teacher")
    load_model(tmp_path / "teacher")  # refuses missing and unexpected keys
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(tmp_path / "teacher" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key].to(torch.bfloat16), after[key])}
    assert changed
    assert all(".layers." in key and "language_model" in key for key in changed)
    assert not any("lora" in key for key in after)


def test_processes_wait_for_a_main_one_that_works_for_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's own limit is ten minutes on GPUs: less than the main process encodes or scores."""
    asked: dict[str, Any] = {}

    def state(**settings: Any) -> SimpleNamespace:
        asked.update(settings)
        return SimpleNamespace(process_index=1, num_processes=2, device="cpu")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", state)
    assert parallel.team("cpu") == Team(1, 2, "cpu")
    assert asked["cpu"] and asked["timeout"] >= timedelta(days=1)


@dataclass(frozen=True)
class Follower(Team):
    """A process whose main one is a minute into the run, whatever its own clock says."""

    def same(self, value: float) -> float:
        return 60.0

    def agree(self, decision: bool) -> bool:
        return decision


def test_all_processes_follow_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TeachConfig(langs=("de",), checkpoint_every=100, eval_every=100)
    training: Any = SimpleNamespace(
        config=config, max_minutes=4.0, team=Follower(1, 2), speech=None
    )
    fractions: list[float] = []

    def step(*given: Any) -> float:
        fractions.append(given[-1])
        return 1.0

    monkeypatch.setattr(loop, "_step", step)
    monkeypatch.setattr(loop, "set_training", lambda *_: None)
    monkeypatch.setattr(loop, "_batches", lambda *_: [(0, [0], False)] * 3)
    given: Any = None
    loop._steps(training, given, RunState(), given, 1000, lambda n=1, note="": None)
    assert fractions == [0.25] * 3


def test_what_the_main_process_holds_is_held_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda held, source: held.fill_(1234.5678901)
    )
    assert Team(1, 2).same(7.0) == 1234.5678901
    assert Team().same(7.0) == 7.0
