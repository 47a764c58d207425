"""`halve bench serve`: a server under load, beside the plain transformers loop in the same server."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.config import ServeBenchConfig
from benchmarks.latency import percentiles, pinned_environment
from benchmarks.memory import peak_memory_bytes
from benchmarks.ties import differs_at_tie
from benchmarks.workload import Clip, FloatArray
from export.runtime import open_translator
from halve import environment
from halve.artefact import Artefact, read, write_json, writing
from halve.audio import read_audio
from halve.corpus import read_corpus
from halve.errors import HalveError
from halve.models import resolve_model
from halve.progress import SILENT, Progress
from halve.translate import Translation

RESULT = "serve.json"
SERVE = (sys.executable, "-m", "pipeline.cli", "serve")
_STOP_S = 60.0


@dataclass(frozen=True)
class _Side:
    """One server: what it serves and how."""

    name: str
    path: Path
    engine: str


@dataclass
class _Regime:
    """What came back in one regime."""

    latencies_ms: list[float] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    """Clip and text of each answer."""
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def record(self) -> dict[str, Any]:
        if not self.latencies_ms:
            raise HalveError(f"No request was answered ({self.errors[0] if self.errors else ''})")
        shares = percentiles(self.latencies_ms)
        return {
            "p50_ms": round(shares["p50"], 2),
            "p95_ms": round(shares["p95"], 2),
            "throughput_rps": round(len(self.latencies_ms) / self.wall_s, 4),
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

    The baseline serves `teacher` (the same model where none is given) with `--engine plain`. Every
    answer is compared with the offline translation of the same file.

    Raises:
        HalveError: a server did not start, or answered nothing.
    """
    sides = [_Side("model", _local(model), "auto")]
    sides.append(_Side("baseline", _local(teacher or model), "plain"))
    parents = {"corpus": corpus} | {side.name: side.path for side in sides}
    with writing(out, "results", config.model_dump(), config.seed, parents) as draft:
        with tempfile.TemporaryDirectory() as folder:
            files = _write_clips(config, corpus, Path(folder))
            found = {side.name: _measure(config, side, files, command, progress) for side in sides}
        result = {
            "bench": "serve",
            "lang": config.lang,
            "path": str(model),
            "teacher": str(teacher or model),
            "threads": config.threads or environment.cores(),
            "segments": len(files),
            "machine": environment.machine(),
            "versions": environment.versions(),
            **found["model"],
            "baseline": found["baseline"],
        }
        result["times_faster"] = _ratios(result, config)
        draft.extra.update(bench="serve", lang=config.lang)
        write_json(draft.path / RESULT, result)
    return read(out)


def _local(path: str | Path) -> Path:
    return Path(path) if Path(path).exists() else Path(resolve_model(path))


def _ratios(result: Mapping[str, Any], config: ServeBenchConfig) -> dict[str, float]:
    one, many = "clients_1", f"clients_{config.clients}"
    baseline = result["baseline"]
    return {
        "p50_at_1_client": round(baseline[one]["p50_ms"] / result[one]["p50_ms"], 2),
        f"throughput_at_{config.clients}_clients": round(
            result[many]["throughput_rps"] / baseline[many]["throughput_rps"], 2
        ),
    }


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
    side: _Side,
    files: Mapping[str, Path],
    command: Sequence[str],
    progress: Progress,
) -> dict[str, Any]:
    """Both regimes of one server, then its texts against the offline ones."""
    regimes: dict[str, _Regime] = {}
    with serving(config, side.path, side.engine, command) as (url, pid):
        for clients in (1, config.clients):
            progress.message(f"serve {side.name} ({side.engine}): {clients} client(s)")
            regimes[f"clients_{clients}"] = asyncio.run(_drive(config, url, files, clients))
        peak_bytes = peak_memory_bytes(pid)
    wrong, ties = _compare(config, side.path, files, list(regimes.values()), progress)
    errors = [error for regime in regimes.values() for error in regime.errors]
    return {
        **{key: regime.record() for key, regime in regimes.items()},
        "engine": side.engine,
        "errors": len(errors),
        "first_error": errors[0] if errors else "",
        "wrong_texts": wrong,
        "tie_texts": ties,
        "compared_texts": sum(len(regime.texts) for regime in regimes.values()),
        "peak_memory_bytes": peak_bytes,
    }


@contextlib.contextmanager
def serving(
    config: ServeBenchConfig, path: Path, engine: str, command: Sequence[str] = SERVE
) -> Iterator[tuple[str, int]]:
    """Runs a server while the block lasts; gives its address and process id once it is ready.

    Raises:
        HalveError: it ended, or was not ready in time.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["--model", str(path), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--engine", engine]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=pinned_environment(config.threads),
        )
        try:
            if not _wait_until_ready(process, url, config.startup_s):
                log.seek(0)
                said = log.read().decode("utf8", errors="replace").strip().splitlines()
                raise HalveError(
                    f"halve serve did not become ready ({said[-1] if said else 'it said nothing'})",
                    expected=f"an answer of {url}/ready within {config.startup_s:.0f} s",
                    mend=f"try `halve serve --model {path} --engine {engine}`",
                )
            yield url, process.pid
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, most_s: float) -> bool:
    end = time.monotonic() + most_s
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/ready").status_code == 200:
                    return True
            time.sleep(0.1)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _drive(
    config: ServeBenchConfig, url: str, files: Mapping[str, Path], clients: int
) -> _Regime:
    """Keeps `clients` requests under way until enough are answered."""
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
        regime = _Regime()
        waiting = iter(range(config.requests))
        started = time.perf_counter()

        async def client_loop() -> None:
            for index in waiting:
                if time.perf_counter() - started > config.regime_s:
                    return
                await ask(index, regime)

        await asyncio.gather(*(client_loop() for _ in range(clients)))
        regime.wall_s = time.perf_counter() - started
    regime.errors += warm.errors
    return regime


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
