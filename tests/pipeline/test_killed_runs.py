"""Killed with SIGKILL at any moment and run again, a run ends with the bytes of one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.pipeline.conftest import ROOT, environment

KILLS = 10

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


def changes(pid: int, out: Path, limit: int | None = None) -> int:
    """Watches a run and counts what happens on disk; kills it at the `limit`th change."""
    seen, count = state(out), 0
    while Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX":
        now = state(out)
        if now != seen:
            seen, count = now, count + 1
            if count == limit:
                os.kill(pid, signal.SIGKILL)
                return count
        time.sleep(0.001)
    return count


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
    total = changes(runner.start(*command, str(calm)), calm)
    assert runner.wait() == 0, runner.log.read_text()
    assert total > 30

    draw = random.Random(11)
    kills, stages, chain = 0, set(), 0
    while kills < KILLS:
        out = tmp_path / f"killed-{chain}"
        # Every fifth dies in a renaming; the others after a short way, so that kills fall on all stages.
        renaming = draw.randint(1, 2) if kills % 5 == 4 else 0
        pid = runner.start(*command, str(out), renaming=renaming)
        changes(pid, out, limit=None if renaming else draw.randint(2, max(3, total // 6)))
        code = runner.wait()
        assert code in (-signal.SIGKILL, 0), runner.log.read_text()
        if code == 0:
            assert_same(calm, out)
            chain += 1
        else:
            kills += 1
            stages |= {path.name for path in out.glob(".*.partial")}
    runner.start(*command, str(out))
    assert runner.wait() == 0, runner.log.read_text()
    assert_same(calm, out)
    assert len(stages) >= 3, f"kills fell on {stages} alone"


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
