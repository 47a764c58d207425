"""`halve bench latency`: load time, time to first token, time per token, RTF and peak memory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import size
from benchmarks.bandwidth import last_cache_bytes
from benchmarks.config import LatencyConfig
from benchmarks.peer_names import PeerName
from benchmarks.speed import add_limits, compare
from benchmarks.workload import Clip, long_clip, short_clip
from halve import environment
from halve.arithmetic import fits_in_float32
from halve.artefact import Artefact, read, writing
from halve.corpus import read_corpus
from halve.errors import HalveError, InputError
from halve.families import Family
from halve.json_files import append_jsonl, read_jsonl, write_json
from halve.models import family_of, resolve_model
from halve.progress import SILENT, Progress

RESULT = "latency.json"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_ROOT = Path(__file__).resolve().parent.parent
_NO_TOKEN = -1
_BASELINE: PeerName = "transformers-fp32"
FAIR_THREADS = 2
"""The baseline is timed with so many threads as well, and the better counts: stock code may gain more from them."""
_METRICS = ("ttft_ms", "tpot_ms", "rtf")
_NO_ROOM = "stock transformers computes in float32, for which the weights have no room here"


@dataclass(frozen=True)
class _Job:
    """One process to time: `kind` is halve, stock, text or bandwidth; `name` a model's path or a peer."""

    kind: str
    name: str
    threads: int
    run: Callable[[], dict[str, Any]]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kind, self.name, self.threads


def run_latency(
    config: LatencyConfig,
    models: Sequence[str | Path],
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
) -> Artefact:
    """Times models on a short and a long clip, each in a fresh process with pinned threads.

    Writes `latency.json`. The clips are real segments of the corpus. The baseline is the stock
    transformers loop in fp32 on the first model that stock transformers can load so; peers run the same
    weights.

    Raises:
        ArtefactError: a path is no model.
        InputError: a model that reads text or hears less than a clip, or peers without a number of tokens
            or an unquantised model.
        HalveError: a model's process failed.
    """
    for model in models:
        check_listens(family_of(resolve_model(model, weights=False)), model)
    given = {str(path): _local(path) for path in models}
    sizes = {name: size.measure(path, name) for name, path in given.items()}
    clips = timed_clips(config, corpus)
    _check_heard_whole(clips, given)
    stock = _stock_model(given) if config.baseline or config.peers else None
    if config.peers and (stock is None or config.new_tokens is None):
        raise InputError(
            "Peers were named without "
            + ("--new-tokens" if stock else "an unquantised checkpoint"),
            expected="--new-tokens N and among --models one that stock transformers loads in fp32",
        )
    timed = config
    if stock and config.baseline and not fits_in_float32(given[stock]):
        # It would be timed last, and its failure would lose the others.
        progress.warn(f"latency: no baseline, {_NO_ROOM}")
        timed = config.model_copy(update={"baseline": False})
    parents = {"corpus": corpus} | {f"model {i}": p for i, p in enumerate(given.values())}
    settings = config.recorded() | environment.measured_on()
    with writing(out, "results", settings, config.seed, parents) as draft:
        store = draft.work / "measured.jsonl"
        done = {tuple(r["key"]): r["answer"] for r in read_jsonl(store)}
        with tempfile.TemporaryDirectory() as folder:
            jobs = list(_jobs(timed, given, stock, clips, Path(folder), progress))
            with progress.task("latency", len(jobs), len(done)) as advance:
                for job in jobs:
                    if job.key not in done:
                        done[job.key] = job.run()
                        append_jsonl(store, {"key": job.key, "answer": done[job.key]})
                        advance(1, f"{job.name} ({job.kind}, {job.threads} threads)")
        result = _result(timed, clips, sizes, done, stock)
        if timed != config:
            result["baseline_note"] = _NO_ROOM
        draft.extra.update(bench="latency", lang=config.lang)
        write_json(draft.path / RESULT, result)
    return read(out)


def check_listens(family: Family, model: str | Path, bench: str = "latency bench") -> None:
    """Refuses a model that there is nothing to time of.

    Raises:
        InputError: it reads text.
    """
    if family.reads == "text":
        raise InputError(
            f"{model} reads text, and the {bench} times audio",
            expected="models that listen",
            mend="leave it out; `halve bench quality` measures text models",
        )


def _check_heard_whole(clips: Sequence[Clip], given: Mapping[str, Path]) -> None:
    """Refuses clips that a front end would cut: the table would say more seconds than were heard."""
    name, heard_s = min(
        ((name, family_of(path).max_audio_s) for name, path in given.items()),
        key=lambda each: each[1],
    )
    longest = max(clips, key=lambda clip: clip.duration_s)
    if longest.duration_s > heard_s:
        raise InputError(
            f"The {longest.name} clip is {longest.duration_s:.1f} s, and {name} hears {heard_s:g} s at once",
            expected=f"clips of at most {heard_s:g} s",
            mend="lower --short-s or --long-s",
        )


def _jobs(
    config: LatencyConfig,
    given: Mapping[str, Path],
    stock: str | None,
    clips: Sequence[Clip],
    folder: Path,
    progress: Progress,
) -> Iterator[_Job]:
    from benchmarks.peers import PEERS

    files = {clip.name: str(clip.write(folder)) for clip in clips}
    counts = _thread_counts(config)
    names: list[PeerName] = list(config.peers)
    if stock and config.baseline and _BASELINE not in names:
        names.insert(0, _BASELINE)
    text = _text_peers(config, given[stock], clips, names, progress) if stock else None
    for threads in counts:
        if config.peers:
            yield _Job("bandwidth", "", threads, _worker(config, threads, {"backend": "bandwidth"}))
        for number, (name, path) in enumerate(given.items()):
            muted = without_ends(path, folder / f"model-{number}-{threads}", config.new_tokens)
            asked = {"backend": "halve", "path": str(muted.resolve()), "clips": files}
            yield _Job("halve", name, threads, _worker(config, threads, asked))
        for peer in names if stock else []:
            if PEERS[peer].whole:
                yield _stock_job(config, peer, given[stock or ""], files, threads)
            else:
                yield _Job("text", peer, threads, _text_run(config, text, peer, threads))
    if stock and config.baseline and FAIR_THREADS not in counts and _has_cores():
        yield _stock_job(config, _BASELINE, given[stock], files, FAIR_THREADS)


def _thread_counts(config: LatencyConfig) -> tuple[int, ...]:
    return tuple(dict.fromkeys((config.threads, *config.also_threads)))


def _has_cores() -> bool:
    """Whether stock code may be faster with more threads here: a GPU does not care."""
    return environment.cores() >= FAIR_THREADS and not environment.machine().get("gpu")


def _stock_job(
    config: LatencyConfig, peer: PeerName, model: Path, files: Mapping[str, str], threads: int
) -> _Job:
    from benchmarks.peers import PEERS

    request = {
        "backend": "stock",
        "path": str(model.resolve()),
        "clips": dict(files),
        "precision": PEERS[peer].precision,
        "cut_audio": PEERS[peer].cut_audio,
    }
    return _Job("stock", peer, threads, _worker(config, threads, request))


def _text_peers(
    config: LatencyConfig,
    model: Path,
    clips: Sequence[Clip],
    names: Sequence[PeerName],
    progress: Progress,
) -> Any:
    from benchmarks.peers import PEERS, TextPeers

    wanted = [name for name in names if not PEERS[name].whole]
    if not wanted:
        return None
    durations_s = {clip.name: clip.duration_s for clip in clips}
    peers = TextPeers(model, config.lang, durations_s, Path(config.peer_folder))
    progress.message(f"latency: convert the decoder for {', '.join(wanted)}")
    peers.prepare(wanted, pinned_environment(None))
    return peers


def _text_run(
    config: LatencyConfig, peers: Any, name: PeerName, threads: int
) -> Callable[[], dict[str, Any]]:
    fields = {"warmup", "repeats", "new_tokens", "timeout_s"}
    settings = config.model_dump(include=fields) | {"threads": threads}
    return lambda: dict(peers.measure(name, settings, pinned_environment(threads)))


def _worker(
    config: LatencyConfig, threads: int, request: Mapping[str, Any]
) -> Callable[[], dict[str, Any]]:
    return lambda: _measure(config, threads, request)


def without_ends(path: Path, folder: Path, new_tokens: int | None) -> Path:
    """The model with no token that ends a translation, as links, where a number of tokens is set."""
    if new_tokens is None:
        return path
    folder.mkdir()
    for entry in path.iterdir():
        (folder / entry.name).symlink_to(entry.resolve())
    for name, key in (("package.json", "end_ids"), ("generation_config.json", "eos_token_id")):
        if (folder / name).exists():
            facts = json.loads((folder / name).read_text(encoding="utf8"))
            (folder / name).unlink()
            write_json(folder / name, facts | {key: [_NO_TOKEN]})
    return folder


def _local(path: str | Path) -> Path:
    return Path(path) if Path(path).exists() else Path(resolve_model(path))


def timed_clips(config: LatencyConfig, corpus_path: Path) -> list[Clip]:
    """The short and the long clip that models are timed on."""
    corpus = read_corpus(corpus_path)
    segments = corpus.split(config.split, config.lang)
    return [
        short_clip(corpus, segments, config.short_s),
        long_clip(corpus, segments, config.long_s, config.pause_s),
    ]


def _stock_model(given: Mapping[str, Path]) -> str | None:
    from benchmarks.baseline import can_load

    return next((name for name, path in given.items() if can_load(path)), None)


def worker_command() -> list[str]:
    """What starts a process that times one of halve's models."""
    return [sys.executable, "-m", "benchmarks.latency_worker"]


def _measure(config: LatencyConfig, threads: int, request: Mapping[str, Any]) -> dict[str, Any]:
    """One model's timings, from a fresh process."""
    path = request.get("path", "memory bandwidth")
    fields = {"lang", "warmup", "repeats", "new_tokens"}
    full = {**request, "threads": threads, **config.model_dump(include=fields)}
    try:
        done = subprocess.run(
            worker_command(),
            input=json.dumps(full).encode(),
            capture_output=True,
            check=False,
            env=pinned_environment(threads if "path" in request else 1),
            timeout=config.timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise HalveError(
            f"{path}: timing it took longer than {config.timeout_s:g} s",
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
    done: Mapping[tuple[str, str, int], dict[str, Any]],
    stock: str | None,
) -> dict[str, Any]:
    entries = {
        (kind, name, threads): _entry(
            kind, name, threads, sizes[stock or "" if kind != "halve" else name], answer
        )
        for (kind, name, threads), answer in done.items()
        if kind != "bandwidth"
    }
    read_rates = {
        threads: {int(size_): rate for size_, rate in answer["bytes_per_s"].items()}
        for (kind, _, threads), answer in done.items()
        if kind == "bandwidth"
    }
    for entry in entries.values():
        add_limits(entry, read_rates.get(entry["threads"]), last_cache_bytes())
    models = [entries["halve", name, config.threads] for name in sizes]
    peers = [
        e for (kind, name, _), e in entries.items() if kind != "halve" and name in config.peers
    ]
    baselines = [
        entry
        for (kind, name, _), entry in entries.items()
        if config.baseline and (kind, name) == ("stock", _BASELINE)
    ]
    # Its own number of threads first: the table sets it beside the models.
    baselines.sort(key=lambda entry: entry["threads"] != config.threads)
    for entry in models:
        compare(entry, baselines, peers)
    baseline = baselines[0] if baselines else None
    return {
        "bench": "latency",
        "lang": config.lang,
        "threads": config.threads,
        "repeats": config.repeats,
        "warmup": config.warmup,
        "new_tokens": config.new_tokens,
        "clips": {
            clip.name: {"duration_s": round(clip.duration_s, 3), "segments": list(clip.segments)}
            for clip in clips
        },
        "machine": environment.machine(),
        "versions": environment.versions(),
        "last_cache_bytes": last_cache_bytes(),
        "read_bytes_per_s": {str(threads): rates for threads, rates in read_rates.items()},
        "baseline": baseline,
        "baseline_other_threads": baselines[1:],
        "baseline_note": _no_baseline(config) if baseline is None else "",
        "models": models,
        "other_threads": [
            entry
            for (kind, _, threads), entry in entries.items()
            if kind == "halve" and threads != config.threads
        ],
        "peers": peers,
    }


def _no_baseline(config: LatencyConfig) -> str:
    return "no unquantised checkpoint among the models" if config.baseline else "not asked for"


def _entry(
    kind: str, name: str, threads: int, measured: size.Size, answer: Mapping[str, Any]
) -> dict[str, Any]:
    """A line of the result; the figures at its top are those of the short clip."""
    clips = {
        clip: {key: _rounded(key, value) for key, value in timed.items()}
        for clip, timed in answer["clips"].items()
    }
    entry = {
        "path": measured.path,
        "layers": measured.decoder_layers,
        "device": answer.get("device", "cpu"),
        "arithmetic": answer.get("arithmetic"),
        "threads": threads,
        "load_s": round(answer["load_s"], 3),
        **{key: clips["short"][key] for key in _METRICS if key in clips["short"]},
        "weight_bytes": answer["weight_bytes"],
        "peak_memory_bytes": answer["peak_memory_bytes"],
        "before_load_bytes": answer["before_load_bytes"],
        "peak_gpu_memory_bytes": answer.get("peak_gpu_memory_bytes"),
        "clips": clips,
    }
    if kind == "halve":
        facts = {"precision": measured.precision, "target": measured.target}
        return {**entry, **facts, "stored_bytes": measured.stored_bytes}
    return {**entry, **_peer_facts(name), "versions": answer.get("versions", {})}


def _peer_facts(name: str) -> dict[str, Any]:
    from benchmarks.peers import PEERS

    peer = PEERS[name]  # type: ignore[index]
    return {
        "peer": name,
        "precision": peer.precision,
        "target": "checkpoint" if peer.whole else name.rsplit("-", 1)[0],
        "whole": peer.whole,
        "compiled": peer.compiled,
    }


def _rounded(key: str, value: Any) -> Any:
    if key in _METRICS:
        return percentiles(value)
    return round(value, 3) if isinstance(value, float) else value


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    p50, p95 = np.percentile(np.asarray(values), [50, 95])
    return {"p50": round(float(p50), 4), "p95": round(float(p95), 4)}
