"""What the user sees: progress and messages on stderr, results on stdout."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from halve.progress import Advance, Progress

_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Result:
    """What a command found: text for people, data for machines."""

    text: str
    data: Any = field(default_factory=dict)

    def show(self, as_json: bool) -> None:
        """Prints it on stdout."""
        if as_json:
            text = json.dumps(self.data, ensure_ascii=False, indent=2, sort_keys=True, default=str)
        else:
            text = self.text
        if text:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


@dataclass(frozen=True)
class Lines(Result):
    """What a command finds line by line, as (text, data): printed as it comes, for machines as one list at the end."""

    found: Iterable[tuple[str, Any]] = ()

    def show(self, as_json: bool) -> None:
        """Prints it on stdout; where something fails on the way, what was found until then all the same."""
        records: list[Any] = []
        try:
            for text, data in self.found:
                records.append(data)
                if not as_json:
                    sys.stdout.write(f"{text}\n")
                    sys.stdout.flush()
        except BaseException:  # Ctrl-C, too
            if as_json and records:
                Result("", records).show(as_json)
            raise
        if as_json:
            Result("", records).show(as_json)


def duration(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def size(size_bytes: float) -> str:
    """A size in decimal units, as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


class LineProgress(Progress):
    """Progress as lines on stderr, for logs and pipes: one at the start, some on the way, one at the end."""

    def message(self, text: str) -> None:
        """See `Progress.message`."""
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """See `Progress.warn`."""
        self.message(f"Warning: {text}")

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """See `Progress.task`."""
        started = shown = time.monotonic()
        count = done

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal count, shown
            count += n
            now = time.monotonic()
            if now - shown >= _LINE_EVERY_S:
                shown = now
                self.message(_line(label, count, total, done, now - started, note))

        if done:
            self.message(f"{label}: going on after {done} of {total}")
        yield advance
        elapsed_s = time.monotonic() - started
        if elapsed_s >= 1.0:
            self.message(f"{label}: {count} done in {duration(elapsed_s)}")


def _line(label: str, count: int, total: int | None, done: int, elapsed_s: float, note: str) -> str:
    text = f"{label}: {count}" + (f" of {total}" if total else "")
    if total and count > done:
        text += f", {duration((total - count) * elapsed_s / (count - done))} left"
    return f"{text}  {note}" if note else text


class BarProgress(LineProgress):
    """Progress as bars on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bars: Any = None

    def message(self, text: str) -> None:
        """See `Progress.message`."""
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """See `Progress.task`."""
        from rich import progress

        outer = self._bars is None
        if outer:
            self._bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
                # On a terminal results go above the bars; into a file or a pipe they go as they are.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._bars.start()
        bars = self._bars
        handle = bars.add_task(label, total=total, completed=done, note="")
        try:
            yield lambda n=1, note="": bars.update(handle, advance=n, note=note)
        finally:
            bars.remove_task(handle)
            if outer:
                bars.stop()
                self._bars = None


def progress() -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return BarProgress() if sys.stderr.isatty() else LineProgress()


def table(header: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Columns in plain text, aligned; `right` names those that hold numbers."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = (
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(cells)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
