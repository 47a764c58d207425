"""What tests of the importers share: sound and text to import, and what an importer says of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from halve.errors import CorpusError
from halve.importers import CorpusConfig, run_corpus
from halve.progress import Advance, Progress


def sound(path: Path, duration_s: float = 1.0, rate_hz: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    noise = np.random.default_rng(seed).normal(0, 0.1, round(duration_s * rate_hz))
    soundfile.write(path, noise, rate_hz)
    return path


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf8")
    return path


class Heard(Progress):
    """Keeps what was told: messages, warnings, and each task with its total and its steps."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []
        self.tasks: list[tuple[str, int | None, int]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        steps = [done]
        yield lambda n=1, note="": steps.append(n)
        self.tasks.append((label, total, sum(steps)))


def faults_of(config: CorpusConfig, source: Path, out: Path) -> str:
    with pytest.raises(CorpusError) as error:
        run_corpus(config, source, out)
    assert not out.exists(), "nothing half-written"
    assert not list(out.parent.glob(f".{out.name}*"))
    return str(error.value)
