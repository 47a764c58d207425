"""Runs a stage in a process of its own, kills it in the middle of its work, and lets it finish.

The processes are forked from a server that has imported torch and computed nothing.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from halve.progress import Advance, Progress

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A stage's function and its arguments, all but the progress."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["peft", "compress.tune", "compress.distill", "tests.compress.kills"]
)


class Told(Progress):
    """Tells another process of each step."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        yield lambda n=1, note="": self._pipe.send_bytes(label.encode())


def _work(job: Job, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    stage, arguments = job
    stage(*arguments, Told(pipe))


def _steps(job: Job, kill_at: int | None = None, delay_s: float = 0.0) -> int:
    """Runs a job, or kills it a moment after so many steps; returns how many it took, -1 if killed."""
    ours, theirs = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_work, args=(job, theirs))
    process.start()
    theirs.close()
    steps = 0
    while steps != kill_at:
        try:
            ours.recv_bytes()
        except EOFError:
            break
        steps += 1
    else:
        time.sleep(delay_s)
        if process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return -1
    assert process.exitcode == 0
    return steps


def survives(calm: Job, struck: Job, kills: int, seed: int) -> None:
    """Runs `calm` undisturbed and `struck` with kills at random moments, to the end."""
    generator = random.Random(seed)
    steps = _steps(calm)
    moments = [generator.randrange(steps // 2, steps)]
    moments += [generator.randrange(1, max(2, steps // 4)) for _ in range(kills - 1)]
    for number, kill_at in enumerate(moments):
        taken = _steps(struck, kill_at, generator.uniform(0, 0.02))
        assert taken == -1 or (number > 0 and taken < kill_at)
        if taken >= 0:  # nothing was left to kill
            return
    assert _steps(struck) < steps


def same_files(one: Path, other: Path) -> None:
    """Both artefacts have the same files with the same bytes, and nothing is left beside them."""
    records = [json.loads((path / "artefact.json").read_text()) for path in (one, other)]
    assert records[0]["files"] == records[1]["files"]
    assert records[0]["extra"] == records[1]["extra"]
    assert not list(other.parent.glob(f".{other.name}*"))
