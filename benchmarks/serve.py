"""`halve bench serve`: a server under load, beside the plain transformers loop in the same server."""

import asyncio
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.batching import decode_rates
from benchmarks.config import ServeBenchConfig
from benchmarks.latency import check_listens, percentiles
from benchmarks.memory import peak_memory_bytes
from benchmarks.server_process import SERVE, serving
from benchmarks.ties import differs_at_tie
from benchmarks.workload import Clip, FloatArray
from export.runtime import open_translator
from halve import environment
from halve.artefact import Artefact, read, writing
from halve.audio import read_audio
from halve.corpus import read_corpus
from halve.errors import HalveError, InputError
from halve.json_files import write_json
from halve.models import family_of, resolve_model
from halve.progress import SILENT, Progress
from halve.translate import Translation

RESULT = "serve.json"
_STOCK_WEIGHTS = {".safetensors", ".bin"}


@dataclass(frozen=True)
class _Side:
    """One server: what it serves and how."""

    name: str
    path: Path
    engine: str
    options: tuple[str, ...] = ()
    """More of its command line."""


@dataclass
class _Regime:
    """What came back in one regime."""

    latencies_ms: list[float] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Clip and text of each answer."""
    errors: list[str] = field(default_factory=list)
    tokens: int = 0
    wall_s: float = 0.0

    def record(self) -> dict[str, Any]:
        if not self.latencies_ms:
            raise HalveError(f"No request was answered ({self.errors[0] if self.errors else ''})")
        shares = percentiles(self.latencies_ms)
        return {
            "p50_ms": round(shares["p50"], 2),
            "p95_ms": round(shares["p95"], 2),
            "throughput_rps": round(len(self.latencies_ms) / self.wall_s, 4),
            "tokens_per_s": round(self.tokens / self.wall_s, 1),
            "requests": len(self.latencies_ms),
        }


def run_serve_bench(
    config: ServeBenchConfig,
    model: str | Path,
    teacher: str | Path | None,
    corpus: Path,
    out: Path,
    progress: Progress = SILENT,
    *,
    command: Sequence[str] = SERVE,
) -> Artefact:
    """Drives `halve serve` as a process with 1 and with many clients; writes `serve.json`.

    Three servers: the model's and the same without batching (`one_at_a_time`), which take turns, so that a
    machine whose speed drifts favours neither, and then the baseline: `teacher` (the same model where none is
    given) with `--engine plain`. Every answer is compared with the offline translation of the same file.

    Raises:
        InputError: stock code has nothing to load of what would be the baseline, or a model reads text.
        HalveError: a server did not start, or answered nothing.
    """
    # No client may be refused: a refusal is no answer to time.
    most = str(max(256, config.clients))
    room = ("--max-queue", most, "--max-concurrent", most)
    batched = ("--batch-size", str(min(256, config.clients)), *room)
    sides = [_Side("model", _local(model), "auto", batched)]
    sides.append(_Side("one_at_a_time", _local(model), "auto", ("--batch-size", "1", *room)))
    sides.append(_Side("baseline", _local(teacher or model), "plain", room))
    _check_baseline(sides[-1].path)
    for side in sides:
        check_listens(family_of(side.path), side.path, "serve bench")
    parents = {"corpus": corpus, "model": sides[0].path, "baseline": sides[-1].path}
    settings = config.recorded() | environment.measured_on()
    with writing(out, "results", settings, config.seed, parents) as draft:
        with tempfile.TemporaryDirectory() as folder:
            files = _write_clips(config, corpus, Path(folder))
            rates = _decode_rates(config, sides[0].path, files, progress)
            found = {
                name: record
                for together in (sides[:-1], sides[-1:])
                for name, record in _measure(config, together, files, command, progress).items()
            }
        result = {
            "bench": "serve",
            "lang": config.lang,
            "path": str(model),
            "teacher": str(teacher or model),
            "threads": config.threads or environment.cores(),
            "segments": len(files),
            "machine": environment.machine(),
            "versions": environment.versions(),
            **found.pop("model"),
            **found,
            "decode_tokens_per_s": rates,
        }
        result["times_faster"] = _ratios(result, config)
        draft.extra.update(bench="serve", lang=config.lang)
        write_json(draft.path / RESULT, result)
    return read(out)


def _local(path: str | Path) -> Path:
    return Path(path) if Path(path).exists() else Path(resolve_model(path))


def _check_baseline(path: Path) -> None:
    """Refuses a package before the servers that are measured before it."""
    files = {entry.suffix for entry in path.iterdir()}
    if not (path / "config.json").is_file() or not files & _STOCK_WEIGHTS:
        raise InputError(
            f"{path} cannot be the baseline: stock transformers finds no config or weights there",
            expected="a checkpoint for the plain engine, beside the model",
            mend="name --teacher",
        )


def _ratios(result: Mapping[str, Any], config: ServeBenchConfig) -> dict[str, float]:
    """How many times better than the plain teacher, and than the same server without batches."""
    one, many = "clients_1", f"clients_{config.clients}"
    baseline, alone = result["baseline"], result["one_at_a_time"]
    found = {
        "p50_at_1_client": baseline[one]["p50_ms"] / result[one]["p50_ms"],
        f"throughput_at_{config.clients}_clients": result[many]["throughput_rps"]
        / baseline[many]["throughput_rps"],
        "batching_throughput_at_1_client": result[one]["throughput_rps"]
        / alone[one]["throughput_rps"],
        f"batching_throughput_at_{config.clients}_clients": result[many]["throughput_rps"]
        / alone[many]["throughput_rps"],
    }
    return {key: round(value, 2) for key, value in found.items()}


def _decode_rates(
    config: ServeBenchConfig, path: Path, files: Mapping[str, Path], progress: Progress
) -> dict[str, float] | None:
    progress.message(f"decoding alone and {config.clients} together")
    translator = open_translator(path, threads=config.threads)
    clips = [read_audio(file) for file in files.values()]
    try:
        return decode_rates(translator, clips, config.lang, config.clients)
    finally:
        translator.close()


def _write_clips(config: ServeBenchConfig, corpus_path: Path, folder: Path) -> dict[str, Path]:
    """The segments as WAV files, by name."""
    corpus = read_corpus(corpus_path)
    segments = corpus.split(config.split, config.lang, config.segments)
    clips = [
        Clip(f"{number:04d}", corpus.audio(segment), (segment.id,))
        for number, segment in enumerate(segments)
    ]
    return {clip.name: clip.write(folder) for clip in clips}


def _measure(
    config: ServeBenchConfig,
    sides: Sequence[_Side],
    files: Mapping[str, Path],
    command: Sequence[str],
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Both regimes of each server, in turns there and back, then its texts against the offline ones."""
    turns = [*sides, *reversed(sides)] if len(sides) > 1 else list(sides)
    regimes = {side.name: {clients: _Regime() for clients in (1, config.clients)} for side in sides}
    with ExitStack() as stack:
        servers = {
            side.name: stack.enter_context(
                serving(
                    [side.path],
                    ("--engine", side.engine, *side.options),
                    threads=config.threads,
                    startup_s=config.startup_s,
                    command=command,
                )
            )
            for side in sides
        }
        for clients in (1, config.clients):
            for side in turns:
                progress.message(f"serve {side.name} ({side.engine}): {clients} client(s)")
                regime = regimes[side.name][clients]
                # Each of its turns has its share; the last one takes what is left.
                begun = bool(regime.latencies_ms)
                share = config.requests // (len(turns) // len(sides))
                chosen = range(share, config.requests) if begun else range(share)
                url = servers[side.name].url
                asyncio.run(_drive(config, url, files, clients, chosen, regime))
        peaks = {name: peak_memory_bytes(server.pid) for name, server in servers.items()}
    return {
        side.name: _record(config, side, files, regimes[side.name], progress)
        | {"peak_memory_bytes": peaks[side.name]}
        for side in sides
    }


def _record(
    config: ServeBenchConfig,
    side: _Side,
    files: Mapping[str, Path],
    regimes: Mapping[int, _Regime],
    progress: Progress,
) -> dict[str, Any]:
    """One server's figures, and its texts against the offline ones."""
    wrong, ties = _compare(config, side.path, files, list(regimes.values()), progress)
    errors = [error for regime in regimes.values() for error in regime.errors]
    return {
        **{f"clients_{clients}": regime.record() for clients, regime in regimes.items()},
        "engine": side.engine,
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "wrong_texts": wrong,
        "tie_texts": ties,
        "compared_texts": sum(len(regime.texts) for regime in regimes.values()),
    }


async def _drive(
    config: ServeBenchConfig,
    url: str,
    files: Mapping[str, Path],
    clients: int,
    chosen: Iterable[int],
    regime: _Regime,
) -> None:
    """Keeps `clients` requests under way until enough are answered; adds them to what `regime` has."""
    data = {name: path.read_bytes() for name, path in files.items()}
    names = list(data)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(
        base_url=url, timeout=config.timeout_s, limits=limits, trust_env=False
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def ask(index: int, regime: _Regime) -> None:
            name = names[index % len(names)]
            await _ask(client, model, config.lang, name, data[name], regime)

        warm = _Regime()
        for start in range(0, config.warmup):
            await asyncio.gather(*(ask(start + place, warm) for place in range(clients)))
        waiting = iter(chosen)
        started = time.perf_counter()

        async def client_loop() -> None:
            for index in waiting:
                if time.perf_counter() - started > config.regime_s:
                    return
                await ask(index, regime)

        await asyncio.gather(*(client_loop() for _ in range(clients)))
        regime.wall_s += time.perf_counter() - started
    regime.errors += warm.errors


async def _ask(
    client: httpx.AsyncClient, model: str, lang: str, name: str, data: bytes, regime: _Regime
) -> None:
    started = time.perf_counter()
    try:
        answer = await client.post(
            "/v1/audio/translations",
            files={"file": (f"{name}.wav", data, "audio/wav")},
            data={"model": model, "to_language": lang, "response_format": "json"},
        )
        answer.raise_for_status()
        text = str(answer.json()["text"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        regime.errors.append(f"{type(error).__name__}: {error}")
        return
    regime.latencies_ms.append(1000 * (time.perf_counter() - started))
    regime.texts.append((name, text))
    regime.tokens += int(answer.headers["x-halve-tokens"])


def _compare(
    config: ServeBenchConfig,
    path: Path,
    files: Mapping[str, Path],
    regimes: Sequence[_Regime],
    progress: Progress,
) -> tuple[int, int]:
    """How many answers differ from the offline translation: outright, and from a near tie on."""
    translator = open_translator(path, threads=config.threads)
    audio: dict[str, FloatArray] = {name: read_audio(file) for name, file in files.items()}
    offline: dict[str, Translation] = {}
    with progress.task("offline translations", len(audio)) as advance:
        for name, clip in audio.items():
            offline[name] = translator.translate([clip], config.lang)[0]
            advance()
    wrong, ties = 0, 0
    judged: dict[tuple[str, str], bool] = {}
    for name, text in (answer for regime in regimes for answer in regime.texts):
        if text.strip() == offline[name].text.strip():
            continue
        if (name, text) not in judged:
            judged[name, text] = differs_at_tie(
                translator, audio[name], config.lang, offline[name].tokens, text, config.tie_gap
            )
        wrong, ties = wrong + (not judged[name, text]), ties + judged[name, text]
    translator.close()
    return wrong, ties
