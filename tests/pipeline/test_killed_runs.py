"""Killed with SIGKILL at any moment and run again, a run ends with the bytes of one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.pipeline.conftest import ROOT, environment

KILLS = 10
STAGES = [
    f".{name}.partial"
    for name in ("corpus", "importance", "pruned", "translations", "adapter", "student")
]

# Loads the libraries once and forks a child for each run: a run then costs its work alone.
_ZYGOTE = """
import json, os, pathlib, signal, sys
import torch, transformers, peft, bitsandbytes
import compress.importance, compress.prune, compress.distill, compress.tune, export.merge
from pipeline.cli import main
def die_at_rename(number):
    '''Dies in front of the number'th renaming of a directory.'''
    left, rename = [number], pathlib.Path.rename
    def dying(self, target):
        if self.is_dir():
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    pathlib.Path.rename = dying

print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(null, 0), os.dup2(log, 1), os.dup2(log, 2)
        arguments, renaming = json.loads(line)
        die_at_rename(renaming)
        main(arguments)
    print(pid, flush=True)
    sys.stdin.readline()  # until then a finished child stays to be looked at
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Runner:
    """Starts runs in forked children."""

    process: "subprocess.Popen[str]"
    log: Path

    def start(self, *arguments: str, renaming: int = 0) -> int:
        """The child's process id; it dies at its `renaming`th renaming of a directory, if that is not 0."""
        print(json.dumps([arguments, renaming]), file=self._stdin, flush=True)
        return int(self._stdout.readline())

    def wait(self) -> int:
        """The child's exit code; negative for a signal."""
        print(file=self._stdin, flush=True)
        return int(self._stdout.readline())

    @property
    def _stdin(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    process = subprocess.Popen(
        [sys.executable, "-c", _ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=environment(),
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Runner(process, tmp_path / "log")
        process.kill()


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
