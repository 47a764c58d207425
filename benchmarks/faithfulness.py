"""Whether float32 ONNX packages say their models' tokens, on all of `select` and the carried `test`.

Run it as ``python -m benchmarks.faithfulness MODEL… --corpus DIR --lang de --out DIR``. For each model, up-cast
to float32, it makes an fp32 package and compares greedy tokens, batched and one by one. Where they differ, the gap
between the model's two best logits at that place is listed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.config import PackageConfig
from export.package import run_package
from export.parity import NEAR_TIE_LOGITS, top_two_gap
from export.runtime import OnnxTranslator
from halve.corpus import Corpus, Segment, read_corpus
from halve.environment import machine, versions
from halve.models import load_model
from halve.sources import read_sources
from halve.translate import TorchTranslator, Translation

SPLITS = ("select", "test")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, writes faithfulness.json, and fails where tokens differ without a near tie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", action="append", required=True)
    parser.add_argument("--limit", type=int, help="at most so many segments of each split")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    rows = [
        row
        for model in given.models
        for row in compare(
            model, read_corpus(given.corpus), given.lang, given.limit, given.batch_size
        )
    ]
    passed = all(
        not row["different"] and len(row["near_ties"]) <= row["segments"] / 100 for row in rows
    )
    facts = {
        "command": f"python -m benchmarks.faithfulness {' '.join(sys.argv[1:])}",
        "near_tie_logits": NEAR_TIE_LOGITS,
        "passed": passed,
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "faithfulness.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="utf8"
    )
    return 0 if passed else 1


def compare(
    model: Path, corpus: Corpus, langs: Sequence[str], limit: int | None, batch_size: int
) -> list[dict[str, Any]]:
    """One row for each language, split and way of running the package."""
    with tempfile.TemporaryDirectory() as folder:
        config = PackageConfig(target="onnx", precision="fp32", langs=tuple(langs))
        path = run_package(config, model, None, Path(folder) / "package").path
        package, student = OnnxTranslator(path), TorchTranslator(load_model(model, dtype="float32"))
        try:
            return [
                row
                for lang in langs
                for split in SPLITS
                for row in _rows(
                    model,
                    student,
                    package,
                    corpus,
                    lang,
                    corpus.split(split, lang, limit),
                    batch_size,
                )
            ]
        finally:
            package.close()


def _rows(
    model: Path,
    student: TorchTranslator,
    package: OnnxTranslator,
    corpus: Corpus,
    lang: str,
    segments: Sequence[Segment],
    batch_size: int,
) -> list[dict[str, Any]]:
    audio = read_sources("audio", corpus, segments)
    started = time.perf_counter()
    expected = student.translate(audio, lang, batch_size=batch_size)
    rows = []
    for batched in (batch_size, 1):
        found = package.translate(audio, lang, batch_size=batched)
        parted = [
            {
                "id": segments[i].id,
                "token": _shared(expected[i], found[i]),
                "gap": top_two_gap(
                    student, audio[i], lang, expected[i].tokens[: _shared(expected[i], found[i])]
                ),
            }
            for i in range(len(audio))
            if (expected[i].tokens, expected[i].stopped) != (found[i].tokens, found[i].stopped)
        ]
        row = {
            "model": model.name,
            "lang": lang,
            "split": segments[0].split,
            "batch_size": batched,
            "segments": len(segments),
            "tokens": sum(len(each.tokens) for each in expected),
            "equal": len(segments) - len(parted),
            "near_ties": [each for each in parted if float(str(each["gap"])) < NEAR_TIE_LOGITS],
            "different": [each for each in parted if float(str(each["gap"])) >= NEAR_TIE_LOGITS],
        }
        print(json.dumps(row), f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
        rows.append(row)
    return rows


def _shared(expected: Translation, found: Translation) -> int:
    """How many first tokens two translations share."""
    pairs = zip(expected.tokens, found.tokens, strict=False)
    same = [one == other for one, other in pairs]
    return same.index(False) if False in same else len(same)


if __name__ == "__main__":
    raise SystemExit(main())
