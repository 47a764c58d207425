"""Translators whose speed and failures a test decides."""

import threading
import time
from collections.abc import Generator, Sequence

import numpy as np

from halve.translate import Translation


class FakeTranslator:
    """Fulfils the Translator protocol; says how long each clip was and into what it went."""

    family = "fake"
    languages = ("de", "zh")
    max_audio_s = 30.0
    sample_rate_hz = 16_000

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[float]] = []
        self.fail_at_s: float | None = None
        self.closed = False

    def text(self, clip: np.ndarray, lang: str) -> str:
        return f"{lang} {len(clip) / 16_000:.2f}"

    def translate(
        self,
        audio: Sequence[np.ndarray],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> list[Translation]:
        seconds = [len(clip) / 16_000 for clip in audio]
        self.batches.append(seconds)
        self.entered.set()
        assert self.gate.wait(60)
        if self.fail_at_s in seconds:
            raise RuntimeError("/secret/path is broken")
        return [Translation(self.text(clip, lang), [1, 2, 3], "end") for clip in audio]

    def stream(
        self, audio: np.ndarray, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        self.batches.append([len(audio) / 16_000])
        self.entered.set()
        text = self.text(audio, lang)
        for character in text:
            assert self.gate.wait(60)
            yield character
        return Translation(text, [1, 2, 3], "end")

    def close(self) -> None:
        self.closed = True


class FakeRow:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens: list[int] = [0]
        self.stopped = ""


class FakeBatch:
    """Rows that take one token a step and end after as many as their clip has seconds."""

    def __init__(self, slots: int, owner: "SteppingTranslator") -> None:
        self.slots = slots
        self.rows: list[FakeRow] = []
        self.owner = owner

    @property
    def free(self) -> int:
        return self.slots - len(self.rows)

    def add(self, inputs: np.ndarray, limit: int) -> FakeRow:
        row = FakeRow(min(limit, len(inputs) // 16_000))
        self.rows.append(row)
        return row

    def step(self) -> list[FakeRow]:
        self.owner.entered.set()
        assert self.owner.gate.wait(60)
        time.sleep(0.005)  # a step takes time: others are encoded meanwhile
        self.owner.batches.append([float(row.limit) for row in self.rows])
        for row in self.rows:
            row.tokens.append(len(row.tokens))
            row.stopped = "end" if len(row.tokens) > row.limit else ""
        stopped = [row for row in self.rows if row.stopped]
        self.rows = [row for row in self.rows if not row.stopped]
        return stopped

    def remove(self, row: FakeRow) -> None:
        self.rows.remove(row)


class SteppingTranslator(FakeTranslator):
    """One whose batches rows can join and leave."""

    def open_batch(self, slots: int) -> FakeBatch:
        self.batch = FakeBatch(slots, self)
        return self.batch

    def inputs(self, audio: np.ndarray, lang: str) -> np.ndarray:
        if lang == "zh":
            raise RuntimeError("no such prompt")
        return audio

    def text(self, tokens: Sequence[int], lang: str = "") -> str:  # type: ignore[override]
        return " ".join(map(str, tokens))
