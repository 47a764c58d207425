"""Where long work reports to: silent here, drawn by `pipeline/console.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a task on by `n` steps; `note` is shown beside the bar."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


def nowhere(n: int = 1, note: str = "") -> None:
    """Moves nothing on."""


class Progress:
    """A progress sink that shows nothing."""

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """One long piece of work of `total` steps, `done` of them by an earlier run."""
        yield nowhere

    def message(self, text: str) -> None:
        """Something worth telling."""

    def warn(self, text: str) -> None:
        """Something the user should know but need not stop for."""


SILENT = Progress()
