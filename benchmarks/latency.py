"""`halve bench latency`: load time, time to first token, time per token, RTF and peak memory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import size
from benchmarks.config import LatencyConfig
from benchmarks.workload import Clip, long_clip, short_clip
from halve import environment
from halve.artefact import Artefact, append_jsonl, read, read_jsonl, write_json, writing
from halve.corpus import read_corpus
from halve.errors import HalveError
from halve.models import resolve_model
from halve.progress import SILENT, Progress

RESULT = "latency.json"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ROOT = Path(__file__).resolve().parent.parent


def run_latency(
    config: LatencyConfig,
    models: Sequence[str | Path],
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
) -> Artefact:
    """Times models on a short and a long clip, each in a fresh process with pinned threads.

    Writes `latency.json`. The clips are real segments of the corpus. The baseline is the stock
    transformers loop in fp32 on the first model that stock transformers can load so.

    Raises:
        ArtefactError: a path is no model.
        HalveError: a model's process failed.
    """
    given = {str(path): _local(path) for path in models}
    sizes = {name: size.measure(path, name) for name, path in given.items()}
    clips = _clips(config, corpus)
    parents = {"corpus": corpus} | {f"model {i}": p for i, p in enumerate(given.values())}
    with writing(out, "results", config.model_dump(), config.seed, parents) as draft:
        stock = _stock_model(given) if config.baseline else None
        jobs = [("halve", name) for name in given] + ([("stock", stock)] if stock else [])
        store = draft.work / "measured.jsonl"
        done = {(r["backend"], r["name"]): r["answer"] for r in read_jsonl(store)}
        with tempfile.TemporaryDirectory() as folder:
            files = {clip.name: str(clip.write(Path(folder))) for clip in clips}
            with progress.task("latency", len(jobs), len(done)) as advance:
                for backend, name in jobs:
                    if (backend, name) not in done:
                        answer = _measure(config, backend, given[name], files)
                        append_jsonl(store, {"backend": backend, "name": name, "answer": answer})
                        done[backend, name] = answer
                        advance(1, f"{name} ({backend})")
        result = _result(config, clips, sizes, done, stock)
        draft.extra.update(bench="latency", lang=config.lang)
        write_json(draft.path / RESULT, result)
    return read(out)


def _local(path: str | Path) -> Path:
    return Path(path) if Path(path).exists() else Path(resolve_model(path))


def _clips(config: LatencyConfig, corpus_path: Path) -> list[Clip]:
    corpus = read_corpus(corpus_path)
    segments = corpus.split(config.split, config.lang)
    return [
        short_clip(corpus, segments, config.short_s),
        long_clip(corpus, segments, config.long_s, config.pause_s),
    ]


def _stock_model(given: Mapping[str, Path]) -> str | None:
    from benchmarks.baseline import can_load

    return next((name for name, path in given.items() if can_load(path)), None)


def _measure(
    config: LatencyConfig, backend: str, path: Path, clips: Mapping[str, str]
) -> dict[str, Any]:
    """One model's timings, from a fresh process."""
    request = {
        "backend": backend,
        "path": str(path.resolve()),
        "lang": config.lang,
        "threads": config.threads,
        "warmup": config.warmup,
        "repeats": config.repeats,
        "clips": dict(clips),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.latency_worker"],
            input=json.dumps(request).encode(),
            capture_output=True,
            check=False,
            env=pinned_environment(config.threads),
            timeout=config.timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise HalveError(
            f"{path}: timing it took longer than {config.timeout_s:.0f} s",
            mend="raise --timeout-s, or lower --repeats",
        ) from None
    if done.returncode != 0:
        said = done.stderr.decode("utf8", errors="replace").strip().splitlines()
        raise HalveError(
            f"{path}: timing it failed ({said[-1] if said else f'exit {done.returncode}'})",
            mend="try `halve translate` with it; for a lack of memory, free some",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def pinned_environment(threads: int | None) -> dict[str, str]:
    """The environment of a measured process: as many threads as asked, and this source tree."""
    variables = dict(os.environ)
    if threads:
        variables.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    known = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([known] if known else [])])
    return variables


def _result(
    config: LatencyConfig,
    clips: Sequence[Clip],
    sizes: Mapping[str, size.Size],
    done: Mapping[tuple[str, str], dict[str, Any]],
    stock: str | None,
) -> dict[str, Any]:
    baseline = _entry(sizes[stock], done["stock", stock], "fp32") if stock else None
    entries = [_entry(sizes[name], done["halve", name]) for name in sizes]
    if baseline:
        for entry in entries:
            entry["times_faster_than_baseline"] = {
                clip: {
                    metric: round(baseline["clips"][clip][metric]["p50"] / timed[metric]["p50"], 2)
                    for metric in ("ttft_ms", "tpot_ms", "rtf")
                }
                for clip, timed in entry["clips"].items()
            }
    return {
        "bench": "latency",
        "lang": config.lang,
        "threads": config.threads,
        "repeats": config.repeats,
        "warmup": config.warmup,
        "clips": {
            clip.name: {"duration_s": round(clip.duration_s, 3), "segments": list(clip.segments)}
            for clip in clips
        },
        "machine": environment.machine(),
        "versions": environment.versions(),
        "baseline": baseline,
        "baseline_note": "" if baseline else "no unquantised checkpoint among the models",
        "models": entries,
    }


def _entry(
    measured: size.Size, answer: Mapping[str, Any], precision: str | None = None
) -> dict[str, Any]:
    """A model's line; the figures at its top are those of the short clip."""
    clips = {
        name: {
            "duration_s": round(timed["duration_s"], 3),
            "tokens": timed["tokens"],
            "text": timed["text"],
            **{metric: percentiles(timed[metric]) for metric in ("ttft_ms", "tpot_ms", "rtf")},
        }
        for name, timed in answer["clips"].items()
    }
    return {
        "path": measured.path,
        "layers": measured.decoder_layers,
        "precision": precision or measured.precision,
        "target": measured.target,
        "stored_bytes": measured.stored_bytes,
        "load_s": round(answer["load_s"], 3),
        **{metric: clips["short"][metric] for metric in ("ttft_ms", "tpot_ms", "rtf")},
        "peak_memory_bytes": answer["peak_memory_bytes"],
        "before_load_bytes": answer["before_load_bytes"],
        "peak_gpu_memory_bytes": answer["peak_gpu_memory_bytes"],
        "clips": clips,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    p50, p95 = np.percentile(np.asarray(values), [50, 95])
    return {"p50": round(float(p50), 4), "p95": round(float(p95), 4)}
