"""Ways to make 4-bit weights, side by side: what each costs in bytes and in score on `select`.

Run it as ``python -m benchmarks.quantisation MODEL --corpus DIR --lang de --out DIR``. Each variant is packaged as
a user would package it and scored against the model's own float32 package, with a paired bootstrap. GPTQ calibrates on
`train`. `select` decides the defaults; `test` is not read.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.config import PackageConfig
from export.package import run_package
from export.runtime import OnnxTranslator
from export.scoring import SelectSet, open_select_sets
from halve.card import stored_bytes
from halve.environment import machine, versions
from halve.metrics import retention, score

VARIANTS: dict[str, dict[str, Any]] = {
    "rtn, encoder in 8 bits": {"quantise": "rtn", "encoder_bits": 8},
    "search, encoder in 8 bits": {"quantise": "search", "encoder_bits": 8},
    "k-quant, encoder in 8 bits": {"quantise": "k-quant", "encoder_bits": 8},
    "gptq, encoder in 8 bits": {"quantise": "gptq", "encoder_bits": 8},
    "rtn": {"quantise": "rtn", "encoder_bits": 4},
    "search": {"quantise": "search", "encoder_bits": 4},
    "k-quant": {"quantise": "k-quant", "encoder_bits": 4},
    "gptq": {"quantise": "gptq", "encoder_bits": 4},
    "gptq, blocks of 16": {"quantise": "gptq", "encoder_bits": 4, "block_size": 16},
    "gptq, blocks of 32": {"quantise": "gptq", "encoder_bits": 4, "block_size": 32},
    "gptq, blocks of 64": {"quantise": "gptq", "encoder_bits": 4, "block_size": 64},
    "gptq, vocabulary trimmed": {"quantise": "gptq", "encoder_bits": 4, "trim_vocab": True},
    "gptq, keys and values in 8 bits": {"quantise": "gptq", "encoder_bits": 4, "kv_bits": 8},
    "int8": {"precision": "int8"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes quantisation.json and quantisation.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", action="append", required=True)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--teacher-bytes", type=int, help="what percentages are of")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    sets = open_select_sets(given.corpus, given.lang, None)
    chosen = given.variant or list(VARIANTS)
    rows = measure(given.model, given.corpus, sets, {name: VARIANTS[name] for name in chosen})
    facts = {
        "command": f"python -m benchmarks.quantisation {' '.join(sys.argv[1:])}",
        "model": given.model.name,
        "segments": len(sets[0].segments),
        "teacher_bytes": given.teacher_bytes,
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "quantisation.json").write_text(
        json.dumps(facts, indent=1) + "\n", encoding="utf8"
    )
    (given.out / "quantisation.md").write_text(table(rows, given.teacher_bytes), encoding="utf8")
    return 0


def measure(
    model: Path, corpus: Path, sets: Sequence[SelectSet], variants: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each variant."""
    langs = tuple(each.lang for each in sets)
    with tempfile.TemporaryDirectory() as folder:
        exact = PackageConfig(target="onnx", precision="fp32", langs=langs)
        path = run_package(exact, model, None, Path(folder) / "fp32").path
        expected = [_texts(path, each) for each in sets]
        rows = []
        for index, (name, settings) in enumerate(variants.items()):
            # One segment is compared on the way; the scores below are of all of them.
            config = PackageConfig.model_validate(
                {
                    "precision": "int4",
                    "langs": langs,
                    "parity_segments": 1,
                    "force": True,
                    **settings,
                }
            )
            started = time.perf_counter()
            path = run_package(config, model, corpus, Path(folder) / str(index)).path
            row = {"variant": name, "settings": settings, "stored_bytes": stored_bytes(path)}
            row["made_s"] = round(time.perf_counter() - started, 1)
            onnx = json.loads((path / "package.json").read_text())["onnx"]
            row |= {key: onnx[key] for key in ("quantise", "bits", "bits_per_weight")}
            row["vocabulary"] = onnx["decoder"]["vocabulary"]
            row["scores"] = {
                each.lang: _against(each, before, _texts(path, each))
                for each, before in zip(sets, expected, strict=True)
            }
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
    return rows


def _texts(path: Path, each: SelectSet) -> list[str]:
    translator = OnnxTranslator(path)
    texts = [row.text for row in each.translate(translator, 8)]
    translator.close()
    return texts


def _against(each: SelectSet, before: list[str], after: list[str]) -> dict[str, Any]:
    kept = asdict(retention(each.metric, before, after, each.references, each.lang))
    names = ("difference", "difference_low", "difference_high", "percent")
    return {
        "metric": each.metric,
        "score": _score(each, after),
        "exact_score": _score(each, before),
        "same_texts": sum(one == other for one, other in zip(before, after, strict=True)),
        **{name: kept[name] for name in names},
    }


def _score(each: SelectSet, texts: list[str]) -> float:
    return score(each.metric, texts, each.references, each.lang).score


def table(rows: Sequence[dict[str, Any]], teacher_bytes: int | None) -> str:
    """The rows as a table in Markdown."""
    langs = list(rows[0]["scores"])
    head = ["variant", "stored MB", "% of teacher", "bits a weight", *langs]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        share = f"{100 * row['stored_bytes'] / teacher_bytes:.1f}" if teacher_bytes else ""
        cells = [row["variant"], f"{row['stored_bytes'] / 1e6:.2f}", share]
        cells.append(f"{row['bits_per_weight']['all']:.2f}")
        for found in row["scores"].values():
            cells.append(
                f"{found['metric']} {found['score']:.2f} ({found['difference']:+.2f} "
                f"[{found['difference_low']:+.2f}, {found['difference_high']:+.2f}])"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
