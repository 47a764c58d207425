"""Decoding alone and in company: tokens a second of a runtime that takes steps.

    python -m benchmarks.batching PACKAGE --corpus demo/corpus --lang de --threads 1 2

Prints one line a number of threads.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.workload import FloatArray
from export.runtime import open_translator
from halve.corpus import read_corpus

TOKENS = 3072
"""Tokens of one measurement."""
ROUNDS = 5
SEGMENTS = 32


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures a package with each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=16)
    asked = parser.parse_args(arguments)
    corpus = read_corpus(asked.corpus)
    clips = [corpus.audio(segment) for segment in corpus.split("test", asked.lang, SEGMENTS)]
    for threads in asked.threads:
        translator = open_translator(asked.package, threads=threads)
        rates = decode_rates(translator, clips, asked.lang, asked.rows)
        print(f"{threads} threads: {rates or 'this runtime takes no steps of its own'}", flush=True)
        translator.close()


if __name__ == "__main__":
    main()
