"""The table of ways to recover: from the records of real runs, wherever each was made."""

from pathlib import Path

import pytest

from benchmarks.recovery import collect, main
from compress.config import TuneConfig
from compress.tune import run_tune
from halve.artefact import read
from halve.errors import ArtefactError
from halve.json_files import read_json


def test_every_run_stands_in_the_table(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    for way, seed, rate in (("fast", 0, 1e-3), ("fast", 1, 1e-3), ("slow", 0, 1e-5)):
        config = TuneConfig(
            langs=("de",),
            method="lora",
            rank=4,
            learning_rate=rate,
            max_steps=1,
            select_segments=2,
            seed=seed,
        )
        run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "tuned" / f"{way}-{seed}")
    assert main([str(tmp_path)]) == 0
    result = read_json(tmp_path / "recovery.json")
    ways, shared = result["ways"], result["shared"]
    assert {way: [run["seed"] for run in runs] for way, runs in ways.items()} == {
        "fast": [0, 1],
        "slow": [0],
    }
    run = ways["slow"][0]
    assert run["score"] == read(tmp_path / "tuned" / "slow-0").extra["score"]
    assert shared["machine"]["cores"] >= 1 and "gpu" not in shared["machine"]
    assert shared["versions"]["torch"] and shared["recipe"]["rank"] == 4
    # What some runs have otherwise stands in each.
    assert run["recipe"] == {"learning_rate": 1e-5, "seed": 0}
    assert ways["fast"][1]["recipe"] == {"learning_rate": 1e-3, "seed": 1}
    lines = (tmp_path / "README.md").read_text(encoding="utf8").splitlines()
    assert sum(line.startswith(("| fast |", "| slow |")) for line in lines) == 2


def test_no_runs_are_told(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="holds no tuned models"):
        collect(tmp_path)
