"""How the cost of the exact search grows, and what bounds its memory.

    python -m benchmarks.scaling --model demo/teacher --corpus demo/corpus --lang de --out DIR

One round for models of several depths, several numbers of segments and of candidates, timed; and the
peak memory of a round for several budgets and numbers of candidates, each in a process of its own. Writes
scaling.json and the tables as README.md.

The teacher's depth is changed in memory: to n of its N layers, evenly spaced and repeated where n > N,
what each adds to the residual stream scaled by N/n. At its own depth it is the teacher itself. The other
models translate worse, so that the tokens they write are told beside the seconds.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_memory_bytes, resident_memory_bytes
from halve import environment
from halve.errors import FamilyError
from halve.families import resolve
from halve.json_files import write_json
from halve.models import SpeechModel, load_model
from halve.progress import Advance, Progress

LAYERS = (4, 8, 12, 24)
SEGMENTS = (30, 60, 120)
CANDIDATES = (2, 5, 10)
BUDGETS_GB = (0.1, 0.2, 0.4, 0.8)
_ADDING = ("o_proj", "down_proj")
"""Linear parts through which a layer of the common shape adds to the residual stream."""


class Stopwatch(Progress):
    """Notes when the whole model has translated, and when the round ends."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.whole_s = 0.0

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """Pieces without a candidate are the whole model's."""

        def advance(n: int = 1, note: str = "") -> None:
            if n == 0:
                self.whole_s = time.perf_counter() - self.started_s

        yield advance


def with_depth(speech: SpeechModel, depth: int) -> SpeechModel:
    """The model with `depth` layers made of its own, in memory; itself where that is its depth.

    Raises:
        FamilyError: layers that are not of the common shape.
    """
    path, _, name = speech.family.layers.rpartition(".")
    layers = speech.part(speech.family.layers)
    have = len(layers)
    if depth == have:
        return speech
    # The layers share one config, and must go on sharing it.
    config = layers[0].self_attn.config
    chosen = [
        copy.deepcopy(layers[place * have // depth], {id(config): config}) for place in range(depth)
    ]
    for index, layer in enumerate(chosen):
        adding = [part for key, part in layer.named_modules() if key.endswith(_ADDING)]
        if len(adding) != len(_ADDING):
            raise FamilyError(f"{speech.path}: no {' and '.join(_ADDING)} in a decoder layer")
        layer.self_attn.layer_idx = index
        for part in adding:
            part.weight.data.mul_(have / depth)
    setattr(resolve(speech.model, path), name, type(layers)(chosen))
    return speech


def measure(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs one round for each cell of the request; in a fresh process, so that the memory is its own."""
    from compress.config import ImportanceConfig
    from compress.importance import by_translation, make_task
    from compress.search import Ledger, Shortlist
    from halve.corpus import read_corpus
    from halve.languages import language

    environment.pin_threads(request["threads"])
    speech = with_depth(load_model(request["model"]), request["layers"])
    heard, lang = read_corpus(request["corpus"]), request["lang"]
    metric = language(lang).selection_metric
    inner = tuple(range(1, request["layers"] - 1))
    found = []
    for cell in request["cells"]:
        segments = heard.split("select", lang, cell["segments"])
        task = make_task(speech, heard, segments, lang, metric)
        candidates = min(cell.get("candidates") or len(inner), len(inner))
        config = ImportanceConfig(remove=1, lang=lang, memory_gb=cell.get("memory_gb"))
        _forget_peak()
        before_bytes = resident_memory_bytes()
        with tempfile.TemporaryDirectory() as folder:
            ledger = Ledger(Path(folder) / "ledger.jsonl")
            watch = Stopwatch()
            shortlist = Shortlist(inner, candidates)
            by_translation(config, speech, task, ledger, watch, shortlist)
            whole_s, all_s = watch.whole_s, time.perf_counter() - watch.started_s
            chunks = ledger.chunks(list)
            tokens = sum(
                len(row)
                for chunk in range(len(chunks))
                for layer in inner[:candidates]
                for row in ledger[1, layer, chunk]
            )
        pieces = candidates * len(segments)
        found.append(
            {
                "layers": request["layers"],
                "segments": len(segments),
                "candidates": candidates,
                "memory_gb": cell.get("memory_gb"),
                "chunks": len(chunks),
                "whole_model_s": whole_s,
                "candidates_s": all_s - whole_s,
                "ms_a_piece": 1000 * (all_s - whole_s) / pieces,
                "tokens_a_piece": tokens / pieces,
                "before_bytes": before_bytes,
                "peak_over_load_bytes": peak_memory_bytes() - before_bytes,
            }
        )
    return found


def _forget_peak() -> None:
    """What loading took for a moment is not the search's: Linux counts the peak anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def in_a_process(request: dict[str, Any]) -> list[dict[str, Any]]:
    """`measure` in a process of its own."""
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--cells"],
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    cells: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return cells


def time_rows(common: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    """The timed rounds: every depth by every number of segments, and fewer candidates at the model's depth."""
    rows = []
    for layers in sorted({*LAYERS, depth}):
        cells: list[dict[str, Any]] = [{"segments": SEGMENTS[0], "candidates": 1}]  # to warm up
        cells += [{"segments": segments} for segments in SEGMENTS]
        if layers == depth:
            fewer = [count for count in CANDIDATES if count < depth - 2]
            cells += [{"segments": SEGMENTS[-1], "candidates": count} for count in fewer]
        rows += in_a_process(common | {"layers": layers, "cells": cells})[1:]
    return rows


def memory_rows(common: dict[str, Any], depth: int) -> list[dict[str, Any]]:
    """Peak memory for every budget and number of candidates."""
    return [
        in_a_process(
            common
            | {
                "layers": depth,
                "cells": [
                    {"segments": SEGMENTS[-1], "candidates": candidates, "memory_gb": budget_gb}
                ],
            }
        )[0]
        for budget_gb in BUDGETS_GB
        for candidates in CANDIDATES
    ]


def time_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what a piece (one candidate on one segment) costs."""
    lines = [
        "| layers | candidates | segments | whole model s | candidates s | ms a piece | ms a piece and layer | tokens a piece |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['layers']} | {row['candidates']} | {row['segments']} | {row['whole_model_s']:.2f} | "
        f"{row['candidates_s']:.2f} | {row['ms_a_piece']:.2f} | "
        f"{row['ms_a_piece'] / row['layers']:.2f} | {row['tokens_a_piece']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the most memory over that of the loaded model, by budget and number of candidates."""
    counts = sorted({row["candidates"] for row in rows})
    header = " | ".join(f"{count} candidates: MB" for count in counts)
    lines = [f"| budget MB | chunks | {header} |", "|---|---|" + "---|" * len(counts)]
    for budget_gb in sorted({row["memory_gb"] for row in rows}):
        same = {row["candidates"]: row for row in rows if row["memory_gb"] == budget_gb}
        peaks = " | ".join(f"{same[count]['peak_over_load_bytes'] / 1e6:.0f}" for count in counts)
        lines.append(f"| {1000 * budget_gb:.0f} | {same[counts[0]]['chunks']} | {peaks} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both parts, or only one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("demo/teacher"))
    parser.add_argument("--corpus", type=Path, default=Path("demo/corpus"))
    parser.add_argument("--lang", default="de")
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument("--part", choices=["time", "memory", "both"], default="both")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cells", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cells:
        sys.stdout.write("\n" + json.dumps(measure(json.loads(sys.stdin.read()))) + "\n")
        return 0
    if given.out is None:
        parser.error("--out is missing")
    common = {
        "model": str(given.model),
        "corpus": str(given.corpus),
        "lang": given.lang,
        "threads": given.threads,
    }
    _write(given.out, common, given.part)
    return 0


def _write(out: Path, common: dict[str, Any], part: str) -> None:
    """Measures, and writes scaling.json and README.md; the part not asked for stays as it was."""
    from halve.models import family_of, read_config

    model = Path(common["model"])
    depth = family_of(model).num_layers(read_config(model))
    out.mkdir(parents=True, exist_ok=True)
    store = out / "scaling.json"
    result = json.loads(store.read_text(encoding="utf8")) if store.is_file() else {}
    for name, rows in (("time", time_rows), ("memory", memory_rows)):
        if part in (name, "both"):
            result[name] = rows(common, depth)
    result |= {
        "command": f"python -m benchmarks.scaling --model {common['model']} --corpus {common['corpus']} "
        f"--lang {common['lang']} --threads {common['threads']}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "threads": common["threads"],
        "own_depth": depth,
    }
    write_json(store, result)
    (out / "README.md").write_text(_page(result), encoding="utf8")


def _page(result: dict[str, Any]) -> str:
    machine = result["machine"]
    parts = [
        "# How the exact search's cost and memory grow\n",
        f"    {result['command']} --out DIR\n",
        f"{machine['cpu']}, {machine['cores']} cores, {result['threads']} threads, fp32; torch "
        f"{result['versions']['torch']}; {result['date']}. A piece is one candidate on one segment.\n",
    ]
    if "time" in result:
        parts += [
            "## Time of one round\n",
            time_table(result["time"]) + "\n",
            f"{result['own_depth']} layers: the model itself. Other depths: its layers, evenly spaced and "
            "repeated, what they add scaled to match; they translate worse, see the tokens. The whole "
            "model's seconds include encoding the audio.\n",
        ]
    if "memory" in result:
        parts += [
            "## Peak memory over the loaded model\n",
            memory_table(result["memory"]) + "\n",
            "Peak resident set of a fresh process less what it held when the model and the audio were "
            "loaded. What a pass through a few layers needs (activations, one block of logits) comes on "
            "top of the budget and is the same for all.\n",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
