"""Timings in turns: each contender is a process that stays open, and runs one clip whenever it is asked to.

On a machine whose speed drifts, only neighbours compare. Needs nothing of halve: peers' environments have none of it.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Timed = dict[str, float]


def answer_turns(run: Callable[[str], Timed], answers: TextIO) -> None:
    """Times the clip that each line of stdin names, until there is none; says first that it is ready."""
    _say({}, answers)
    for line in sys.stdin:
        _say(run(line.strip()), answers)


def _say(answer: Timed, answers: TextIO) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


class Contender:
    """A worker that has opened its model and waits for its turn; close it."""

    def __init__(
        self, command: list[str], request: Mapping[str, Any], variables: Mapping[str, str]
    ) -> None:
        """Starts the worker and waits until it is ready.

        Raises:
            RuntimeError: it ended.
        """
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(variables),
            text=True,
        )
        self._ask(json.dumps({**request, "turns": True}))

    def turn(self, clip: str) -> Timed:
        """One timing of a clip, in milliseconds.

        Raises:
            RuntimeError: the worker ended.
        """
        return self._ask(clip)

    def _ask(self, line: str) -> Timed:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: no answer says so
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{process.args!r} ended with exit status {process.wait()}")
        timed: Timed = json.loads(answer)
        return timed

    def close(self) -> None:
        """Ends the worker."""
        self._process.communicate()
