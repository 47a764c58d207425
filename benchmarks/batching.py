"""Decoding alone and in company: tokens a second of a runtime that takes steps."""

import itertools
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.workload import FloatArray

TOKENS = 1024
"""Tokens of one measurement."""
ROUNDS = 3


def decode_rates(
    translator: Any, clips: Sequence[FloatArray], lang: str, batch_size: int
) -> dict[str, float] | None:
    """Decoded tokens a second, one row at a time and with a batch that is kept full.

    Only decoding steps are timed; prompts are read between them. A row that ends makes way for the
    next clip. Both sizes take turns, and each one's median counts.

    Args:
        translator: an `export.runtime.OnnxTranslator`.
        clips: what is translated, over and over.

    Returns:
        batch_1, batch_N and their ratio `times`; None for a runtime without steps of its own.
    """
    if not hasattr(translator, "open_batch"):
        return None
    inputs = [translator.inputs(clip, lang) for clip in clips]
    found: dict[int, list[float]] = {1: [], batch_size: []}
    for size in (1, batch_size):
        _rate(translator, inputs, size, TOKENS // 8)
    for size in (1, batch_size) * ROUNDS:
        found[size].append(_rate(translator, inputs, size, TOKENS))
    alone, together = median(found[1]), median(found[batch_size])
    return {
        "batch_1": round(alone, 1),
        f"batch_{batch_size}": round(together, 1),
        "times": round(together / alone, 2),
    }


def _rate(translator: Any, inputs: Sequence[FloatArray], size: int, tokens: int) -> float:
    """Tokens a second of decoding steps with `size` rows each."""
    batch = translator.open_batch(size)
    most = translator.manifest.decoder.max_positions
    waiting = itertools.cycle(inputs)
    said, seconds = 0, 0.0
    while said < tokens:
        while batch.free:
            prompt = next(waiting)
            batch.add(prompt, min(64, most - len(prompt)))
        started = time.perf_counter()
        rows = len(batch.rows)
        batch.step()
        seconds += time.perf_counter() - started
        said += rows
    return said / seconds
