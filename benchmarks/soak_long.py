"""An hour of speech through `halve serve`, and whether memory grows with length.

    python -m benchmarks.soak_long --model PACKAGE --corpus demo/corpus --lang de --out DIR

The same speech is sent as a short and as a long file; the server's resident memory is read all the
time. Every stretch of the long answer is compared with the offline translation of the same samples.
Writes soak_long.json; exit status 1 if anything in it is a fault.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.server_process import Server, serving
from benchmarks.soak import TIE_GAP, missing
from benchmarks.soak_audio import CONTAINERS, encoded
from benchmarks.soak_load import Answer
from benchmarks.ties import differs_at_tie
from benchmarks.workload import FloatArray
from export.runtime import open_translator
from halve import environment
from halve.audio import SAMPLE_RATE_HZ, read_audio
from halve.corpus import read_corpus

SHORT_S = 900.0
"""Long enough to meet the stretches that take most: what grows after it grows with length."""
GROWTH_BYTES = 16_000_000
"""The long file may take so much more than the short one: text, tokens, the allocator's slack."""


class Highest(threading.Thread):
    """The most resident memory of a process while the block lasts."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self.bytes = 0

    def run(self) -> None:
        while not self._over.wait(0.05):
            self.bytes = max(self.bytes, self._process.memory_info().rss)

    def __enter__(self) -> "Highest":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def speech(corpus_path: Path, lang: str, duration_s: float) -> FloatArray:
    """The corpus's test recordings, over and over, with pauses of 0.6 s."""
    corpus = read_corpus(corpus_path)
    pause = np.zeros(round(0.6 * SAMPLE_RATE_HZ), np.float32)
    clips = [corpus.audio(segment) for segment in corpus.split("test", lang)]
    parts, most = [], round(duration_s * SAMPLE_RATE_HZ)
    length, place = 0, 0
    while length < most:
        parts += [clips[place % len(clips)], pause]
        length += len(parts[-2]) + len(pause)
        place += 1
    return np.concatenate(parts)[:most]


def ask(server: Server, model: str, lang: str, file: Path) -> dict[str, Any]:
    """The last event of the stream, with when the first text came and the peak of memory."""
    data = {"model": model, "to_language": lang, "stream": "true"}
    started_s, first_s, done = time.monotonic(), 0.0, {}
    url = f"{server.url}/v1/audio/translations"
    with (
        Highest(server.pid) as highest,
        file.open("rb") as content,
        httpx.stream("POST", url, data=data, files={"file": content}, timeout=3600) as answer,
    ):
        for line in filter(None, answer.iter_lines()):
            first_s = first_s or time.monotonic() - started_s
            done = json.loads(line.removeprefix("data: "))
    if done.get("type") != "transcript.text.done":
        raise SystemExit(f"the stream ended with {str(done)[:300]}")
    return {
        **done,
        "first_text_s": first_s,
        "wall_s": time.monotonic() - started_s,
        "peak_bytes": highest.bytes,
    }


def compare(model: Path, lang: str, samples: FloatArray, segments: list[Any]) -> dict[str, Any]:
    """Every stretch against the offline translation of its samples."""
    translator = open_translator(model)
    counts = {"stretches": len(segments), "wrong_texts": 0, "tie_texts": 0}
    differences = []
    for segment in segments:
        start, end = (round(segment[key] * SAMPLE_RATE_HZ) for key in ("start", "end"))
        if segment["stopped"] == "silence":
            continue
        offline = translator.translate([samples[start:end]], lang)[0]
        if offline.text.strip() == segment["text"].strip():
            continue
        near = differs_at_tie(
            translator, samples[start:end], lang, offline.tokens, segment["text"], TIE_GAP
        )
        counts["tie_texts" if near else "wrong_texts"] += 1
        differences.append({**segment, "near": near, "offline": offline.text})
    translator.close()
    return {**counts, "differences": differences}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both files, the short one twice: its first time warms the server up."""
    samples = speech(options.corpus, options.lang, options.minutes * 60.0)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, length_s in (("short", SHORT_S), ("long", options.minutes * 60.0)):
            files[name] = Path(folder) / f"{name}.flac"
            part = samples[: round(length_s * SAMPLE_RATE_HZ)]
            files[name].write_bytes(encoded(part, CONTAINERS["flac"]))
        sizes = {name: path.stat().st_size for name, path in files.items()}
        with serving([options.model]) as server:
            model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
            for name in ("short", "short", "long"):
                found[name] = ask(server, model, options.lang, files[name])
        heard = read_audio(files["long"])
    counts = compare(options.model, options.lang, heard, found["long"]["segments"])
    return summarise(found, sizes, counts)


def summarise(
    found: dict[str, dict[str, Any]], sizes: dict[str, int], counts: dict[str, Any]
) -> dict[str, Any]:
    """The result; `faults` is empty if all went well."""
    growth = found["long"]["peak_bytes"] - found["short"]["peak_bytes"]
    faults = []
    for name, answer in found.items():
        parts = tuple((part["start"], part["end"], part["text"]) for part in answer["segments"])
        if gap := missing(Answer(name, answer["text"], parts), answer["duration"]):
            faults.append(f"{name}: {gap}")
    if growth > GROWTH_BYTES:
        faults.append(f"the long file took {growth / 1e6:.1f} MB more than the short one")
    if counts["wrong_texts"]:
        faults.append(f"{counts['wrong_texts']} stretches differ from the offline translation")
    regimes = {
        name: {
            "audio_s": answer["duration"],
            "upload_bytes": sizes[name],
            "wall_s": round(answer["wall_s"], 2),
            "rtf": round(answer["wall_s"] / answer["duration"], 4),
            "first_text_s": round(answer["first_text_s"], 3),
            "coverage": answer["coverage"],
            "truncated": answer["truncated"],
            "peak_memory_mb": round(answer["peak_bytes"] / 1e6, 1),
        }
        for name, answer in found.items()
    }
    return {
        "command": "python -m benchmarks.soak_long " + " ".join(sys.argv[1:]),
        "machine": environment.machine(),
        "versions": environment.versions(),
        **regimes,
        "peak_growth_mb": round(growth / 1e6, 1),
        **counts,
        "faults": faults,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--lang", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (options.out / "soak_long.json").write_text(text + "\n", encoding="utf8")
    print(text)
    sys.exit(1 if result["faults"] else 0)
