"""Runs the command line as its users do: as a process."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.forks import Forks, forking

ROOT = Path(__file__).resolve().parent.parent.parent

Halve = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """The environment of a child: this checkout first, one thread."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """What starts commands."""
    with forking(environment()) as found:
        yield found


@pytest.fixture
def halve(forks: Forks, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Halve:
    """`halve ARGUMENTS…` in an empty directory."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        said = tmp_path_factory.mktemp("said")
        out, error = said / "out", said / "error"
        forks.start(*arguments, place=tmp_path, out=out, error=error)
        code = forks.wait()
        texts = [file.read_text(encoding="utf8") for file in (out, error)]
        return subprocess.CompletedProcess([str(each) for each in arguments], code, *texts)

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
