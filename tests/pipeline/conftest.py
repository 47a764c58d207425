"""Runs the command line as its users do: as a process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

Halve = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """The environment of a child: this checkout first, one thread."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def halve(tmp_path: Path) -> Halve:
    """`halve ARGUMENTS…` in an empty directory."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *map(str, arguments)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def small_recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_corpus: Path
) -> Path:
    """A whole run on the tiny model: every stage, as little of each as shows that it works."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(
        f"""\
lang: de
teacher: {tiny_model}
corpus: {{source: {tiny_corpus}, format: halve, duplicates: keep}}
importance: {{remove: 2, segments: 4}}
prune: {{}}
distill: {{batch_size: 4, min_score: 0, max_length_ratio: 1000, limit: 8}}
tune: {{epochs: 2, batch_size: 2, rank: 4, alpha: 8, learning_rate: 1.0e-3, checkpoint_every: 2, select_segments: 2}}
merge: {{onto: base}}
packages:
  - {{target: checkpoint, precision: bf16, parity_segments: 2, max_drop: 100}}
bench:
  quality: {{limit: 3, resamples: 100, controls: false}}
""",
        encoding="utf8",
    )
    return path
