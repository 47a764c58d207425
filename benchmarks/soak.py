"""Minutes of mixed load on `halve serve`: nothing may be wrong, lost, leaked or left behind.

    python -m benchmarks.soak --model PACKAGE --corpus demo/corpus --lang de --out DIR

Clients send speech in several containers and ask for it in every format, one request in ten is
hostile and one in twenty is given up half way. Then the server is told to stop under full load.
Writes soak.json; exit status 1 if anything in it is a fault.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.latency import percentiles
from benchmarks.server_process import Server, serving
from benchmarks.soak_audio import Sound, hostile_files, long_sounds, sounds
from benchmarks.soak_load import Answer, Client, Record, Stock
from benchmarks.ties import differs_at_tie
from benchmarks.workload import FloatArray
from export.runtime import open_translator
from halve import environment
from halve.audio import SAMPLE_RATE_HZ
from halve.corpus import read_corpus
from halve.translate import Translation

FLAT_SHARE = 0.05
TIE_GAP = 1e-2
GAP_S = 0.05
"""Times are given to the hundredth."""
MOST_TIES = 0.01
LONG_S = 45.0
PROBE_EVERY_S = 0.1


@dataclass
class Watch:
    """What was seen of the server from outside, a line a second."""

    memory_bytes: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, resident bytes)."""
    named_files: int = 0
    """Most files with a name in its private directory."""
    descriptors: list[tuple[float, int]] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)

    async def run(self, server: Server, uploads: Path, stopping: asyncio.Event) -> None:
        """Looks until the server is told to stop."""
        started_s = time.monotonic()
        process = psutil.Process(server.pid)
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as http:
            while not stopping.is_set():
                since_s = time.monotonic() - started_s
                if not self.memory_bytes or since_s - self.memory_bytes[-1][0] >= 1.0:
                    self.memory_bytes.append((since_s, process.memory_info().rss))
                    self.descriptors.append((since_s, process.num_fds()))
                    found = sum(path.is_file() for path in uploads.rglob("*"))
                    self.named_files = max(self.named_files, found)
                asked_s = time.monotonic()
                (await http.get("/health")).raise_for_status()
                self.health_ms.append(1000 * (time.monotonic() - asked_s))
                await asyncio.sleep(PROBE_EVERY_S)

    def minutes(self) -> list[float]:
        """Mean resident megabytes of each minute, the last of which may be short."""
        most = int(self.memory_bytes[-1][0] // 60) + 1
        rows = [[b for s, b in self.memory_bytes if s // 60 == minute] for minute in range(most)]
        return [round(mean(row) / 1e6, 2) for row in rows if row]


async def drive(
    server: Server, stock: Stock, options: argparse.Namespace, uploads: Path
) -> tuple[Record, Watch, int]:
    """The load, then SIGTERM under it; what came back, what was seen, the exit status."""
    record, watch, stopping = Record(), Watch(), asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as http:
        models = [model["id"] for model in (await http.get("/v1/models")).json()["data"]]
    until_s = time.monotonic() + options.seconds
    clients = [
        Client(server.url, models, options.lang, stock, seed) for seed in range(options.clients)
    ]
    # They go on after the time is over, until the server hangs up.
    running = [
        asyncio.create_task(client.run(record, until_s + 120, stopping)) for client in clients
    ]
    watching = asyncio.create_task(watch.run(server, uploads, stopping))
    await asyncio.sleep(max(0.0, until_s - time.monotonic()))
    stopping.set()
    await watching
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*running)
    status = await asyncio.to_thread(server.process.wait, 60)
    return record, watch, status


def judge(
    model: Path, options: argparse.Namespace, record: Record, known: dict[str, Sound]
) -> dict[str, int]:
    """Every text against the offline translation of the same samples."""
    translator = open_translator(model, threads=options.threads)
    offline: dict[tuple[str, float, float], Translation] = {}
    verdicts: dict[tuple[Any, ...], str] = {}
    counts = {"compared_texts": 0, "wrong_texts": 0, "tie_texts": 0}
    for answer in record.answers:
        if gap := missing(answer, known[answer.sound].duration_s):
            record.faults.append(f"{answer.sound}: {gap}")
        for start_s, end_s, text in _parts(answer, known[answer.sound]):
            key = (answer.sound, start_s, end_s)
            samples = _cut(known[answer.sound].samples, start_s, end_s)
            if key not in offline:
                offline[key] = translator.translate([samples], options.lang)[0]
            if (*key, text) not in verdicts:
                verdicts[*key, text] = _verdict(
                    translator, samples, options.lang, offline[key], text
                )
            verdict = verdicts[*key, text]
            counts["compared_texts"] += 1
            counts["wrong_texts"] += verdict == "wrong"
            counts["tie_texts"] += verdict == "tie"
            if verdict == "wrong":
                record.faults.append(f"{key}: {text!r}, offline {offline[key].text!r}")
    translator.close()
    return counts


def _parts(answer: Answer, sound: Sound) -> list[tuple[float, float, str]]:
    if len(answer.segments) > 1:
        return list(answer.segments)
    return [(0.0, sound.duration_s, answer.text)]


def missing(answer: Answer, duration_s: float) -> str:
    """What an answer of several stretches leaves out of its audio or of its text; empty where nothing."""
    stretches = answer.segments
    if len(stretches) < 2:
        return ""
    ends = [0.0, *(end for _, end, _ in stretches)]
    for before, (start, _, _) in zip(ends, stretches, strict=False):
        if abs(start - before) > GAP_S:
            return f"nothing between {before:.2f} and {start:.2f} s"
    if abs(ends[-1] - duration_s) > GAP_S:
        return f"it ends at {ends[-1]:.2f} of {duration_s:.2f} s"
    joined = "".join(text for _, _, text in stretches)
    return "" if "".join(joined.split()) == "".join(answer.text.split()) else "text of no stretch"


def _cut(samples: FloatArray, start_s: float, end_s: float) -> FloatArray:
    return samples[round(start_s * SAMPLE_RATE_HZ) : round(end_s * SAMPLE_RATE_HZ)]


def _verdict(
    translator: Any, samples: FloatArray, lang: str, offline: Translation, text: str
) -> str:
    if " ".join(text.split()) == " ".join(offline.text.split()):
        return "equal"
    near = differs_at_tie(translator, samples, lang, offline.tokens, text, TIE_GAP)
    return "tie" if near else "wrong"


def summarise(
    record: Record,
    watch: Watch,
    texts: dict[str, int],
    left: int,
    status: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The result; `faults` is empty if all went well."""
    minutes = watch.minutes()
    full = minutes[: int(options.seconds // 60)]
    growth = full[-1] / full[1] - 1 if len(full) > 2 else None
    faults = list(record.faults)
    if growth is not None and abs(growth) > FLAT_SHARE:
        faults.append(f"memory grew by {growth:.1%} from the second minute to the last")
    if watch.named_files or left:
        faults.append(f"{watch.named_files} files with names, {left} left at the end")
    if status:
        faults.append(f"the server ended with {status} after SIGTERM")
    if texts["tie_texts"] > MOST_TIES * texts["compared_texts"]:
        faults.append("more than 1 % of the texts differ from a near tie on")
    answered = sum(record.statuses.get("well-formed", {}).values())
    return {
        "seconds": options.seconds,
        "clients": options.clients,
        "requests": {kind: dict(sorted(found.items())) for kind, found in record.statuses.items()},
        "well_formed_per_s": round(answered / options.seconds, 2),
        "latency_ms": percentiles(record.latencies_ms),
        **texts,
        "errors_500": sum(found.get("500", 0) for found in record.statuses.values()),
        "memory_mb_by_minute": minutes,
        "memory_growth_second_to_last_minute": None if growth is None else round(growth, 4),
        "descriptors_at_most": max(count for _, count in watch.descriptors),
        "health_ms": {
            **percentiles(watch.health_ms),
            "p99": round(float(np.percentile(watch.health_ms, 99)), 2),
            "most": round(max(watch.health_ms), 2),
        },
        "named_files": watch.named_files,
        "files_left": left,
        "sigterm": {"exit_status": status, "refused_connections": record.refused_connections},
        "faults": faults[:50],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole soak."""
    corpus = read_corpus(options.corpus)
    segments = corpus.split("test", options.lang, options.segments)
    short = sounds(corpus, segments)
    long = long_sounds(corpus, segments, LONG_S, 3)
    stock = Stock(short, long, hostile_files(short[0]))
    known = {sound.name: sound for sound in (*short, *long)}
    with tempfile.TemporaryDirectory() as folder:
        uploads = Path(folder)
        extra = ["--temp-dir", folder, "--max-queue", str(options.max_queue), *options.serve]
        with serving([options.model], extra, threads=options.threads) as server:
            record, watch, status = asyncio.run(drive(server, stock, options, uploads))
        left = sum(1 for _ in uploads.rglob("*"))
    texts = judge(options.model, options, record, known)
    return {
        "command": "python -m benchmarks.soak " + " ".join(sys.argv[1:]),
        "machine": environment.machine(),
        "versions": environment.versions(),
        **summarise(record, watch, texts, left, status, options),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--segments", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-queue", type=int, default=15, help="low, so that some are refused")
    parser.add_argument("--serve", nargs="*", default=[], help="more options of halve serve")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (options.out / "soak.json").write_text(text + "\n", encoding="utf8")
    print(text)
    sys.exit(1 if result["faults"] else 0)
