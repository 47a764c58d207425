"""Runs the command line in forked children of a process that has the libraries: a run then costs its work alone."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_ZYGOTE = """
import gc, json, os, pathlib, signal, sys, traceback
import torch, transformers, peft, bitsandbytes, soundfile
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
import compress.importance, compress.prune, compress.distill, compress.tune, export.merge
from halve.families import FAMILIES
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

gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        arguments, place, streams, renaming = json.loads(line)
        os.chdir(place)
        for number, name in enumerate([os.devnull, *streams]):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        die_at_rename(renaming)
        code = 1
        try:
            main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking down what was forked costs seconds: every page is copied first
    print(pid, flush=True)
    sys.stdin.readline()  # until then a finished child stays to be looked at
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Forks:
    """Starts commands, one at a time."""

    process: "subprocess.Popen[str]"

    def start(
        self, *arguments: object, place: Path, out: Path, error: Path, renaming: int = 0
    ) -> int:
        """The child's process id; it dies at its `renaming`th renaming of a directory, if that is not 0."""
        asked = [[str(each) for each in arguments], str(place), [str(out), str(error)], renaming]
        print(json.dumps(asked), file=self._stdin, flush=True)
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


@contextmanager
def forking(environment: dict[str, str]) -> Iterator[Forks]:
    """Children have this environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", _ZYGOTE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Forks(process)
        process.kill()
