"""Killed with SIGKILL at any moment and run again, a run ends with the bytes of one that was never killed."""

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT
from tests.pipeline.forks import Forks

KILLS = 10
STAGES = [
    f".{name}.partial"
    for name in ("corpus", "importance", "pruned", "translations", "adapter", "student")
]


@dataclass
class Runner:
    """Starts runs whose words go into one log."""

    forks: Forks
    place: Path

    def start(self, *arguments: str, renaming: int = 0) -> int:
        """See `Forks.start`."""
        both = {"out": self.log, "error": self.log}
        return self.forks.start(*arguments, place=self.place, renaming=renaming, **both)

    def wait(self) -> int:
        """See `Forks.wait`."""
        return self.forks.wait()

    @property
    def log(self) -> Path:
        return self.place / "log"


@pytest.fixture
def runner(forks: Forks, tmp_path: Path) -> Runner:
    return Runner(forks, tmp_path)


def state(out: Path) -> int:
    """A number that changes with every file that is made, grows or is renamed."""
    found = []
    for folder, _, names in os.walk(out):
        for path in (Path(folder, name) for name in names):
            try:
                found.append((str(path), path.stat().st_size))
            except FileNotFoundError:  # renamed while we looked
                found.append((str(path), -1))
    return hash(tuple(sorted(found)))


def changes(
    pid: int, out: Path, limit: int | None = None, stage: str | None = None
) -> Counter[str]:
    """Watches a run and counts what happens on disk, by stage; kills it at the `limit`th change of `stage`.

    A stage that ends before that many changes is followed by a kill at once.
    """
    seen, found = state(out), Counter[str]()
    while Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX":
        now = state(out)
        if now != seen:
            seen = now
            found.update(path.name for path in out.glob(".*.partial"))
        if stage and (found[stage] >= (limit or 1) or (out / stage[1 : -len(".partial")]).exists()):
            os.kill(pid, signal.SIGKILL)
            return found
        time.sleep(0.001)
    return found


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often a run was killed."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "timings.jsonl"
    }


def test_kills_at_random_moments(runner: Runner, small_recipe: Path, tmp_path: Path) -> None:
    survives(runner, small_recipe, tmp_path)


@pytest.mark.slow
def test_kills_on_the_bundled_model(runner: Runner, tmp_path: Path) -> None:
    survives(runner, ROOT / "demo" / "recipe.yaml", tmp_path)


def survives(runner: Runner, recipe: Path, tmp_path: Path) -> None:
    """Runs the recipe undisturbed, then with ten kills, and compares every byte."""
    calm = tmp_path / "calm"
    command = ("run", str(recipe), "--to", "merge", "--out")
    calm_changes = changes(runner.start(*command, str(calm)), calm)
    assert runner.wait() == 0, runner.log.read_text()

    draw = random.Random(11)
    stages = [name for name in STAGES if calm_changes[name]]  # a short one may pass unseen
    assert len(stages) >= 3, f"saw {calm_changes} alone"
    aims = sorted(stages + draw.choices(stages, k=KILLS - 2 - len(stages)), key=STAGES.index)
    # Two more die in a renaming, wherever that comes: in a checkpoint's, or in a stage's own.
    aims[2:2], aims[7:7] = [""], [""]
    struck, chain = Counter[str](), 0
    for aim in aims:
        out = tmp_path / f"killed-{chain}"
        pid = runner.start(*command, str(out), renaming=0 if aim else draw.randint(1, 2))
        changes(pid, out, draw.randint(1, calm_changes[aim]) if aim else None, aim or None)
        code = runner.wait()
        assert code in (-signal.SIGKILL, 0), runner.log.read_text()
        if code == 0:
            assert_same(calm, out)
            chain += 1
        struck.update(path.name for path in out.glob(".*.partial"))
    runner.start(*command, str(out))
    assert runner.wait() == 0, runner.log.read_text()
    assert_same(calm, out)
    assert len(struck) >= 3, f"kills fell on {struck} alone"


def assert_same(calm: Path, killed: Path) -> None:
    """Every file, and no other, with the same bytes."""
    expected, found = bytes_of(calm), bytes_of(killed)
    assert sorted(expected) == sorted(found)
    different = [name for name, content in expected.items() if found[name] != content]
    assert different == []
    for name in (
        "importance/plan.json",
        "translations/translations.jsonl",
        "student/model.safetensors",
    ):
        assert name in expected
