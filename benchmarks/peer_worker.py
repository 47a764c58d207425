"""Prepares or times one peer, in a process and if need be an environment of its own.

Run as `python -m benchmarks.peer_worker`: one JSON request on stdin, one JSON answer on stdout; or, where the
request has `turns`, an answer for every line after it. Needs numpy and the peer's libraries, nothing of halve.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak_memory_bytes, resident_memory_bytes
from benchmarks.turns import answer_turns

_LIBRARIES = (
    "onnxruntime",
    "onnxruntime-genai",
    "optimum-onnx",
    "ctranslate2",
    "llama-cpp-python",
    "torch",
    "transformers",
)


def peer_class(name: str) -> Any:
    """The class that runs a peer."""
    from benchmarks import peers_onnx, peers_text

    return {
        "torch-onnx-fp32": peers_onnx.TorchOnnx,
        "torch-onnx-int8": peers_onnx.TorchOnnxInt8,
        "torch-onnx-int4": peers_onnx.TorchOnnxInt4,
        "genai-int4": peers_onnx.Genai,
        "genai-int4-block128": peers_onnx.GenaiBlock128,
        "genai-int4-kv8": peers_onnx.GenaiKv8,
        "optimum-fp32": peers_text.Optimum,
        "optimum-int8": peers_text.OptimumInt8,
        "ctranslate2-int8": peers_text.CTranslate2,
        "llama.cpp-f16": peers_text.LlamaCpp,
        "llama.cpp-q8_0": peers_text.LlamaCppQ8,
        "llama.cpp-q4_0": peers_text.LlamaCppQ4,
    }[name]


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Converts the text model; what is there already is left."""
    folder = Path(request["folder"])
    done, peer = folder / "prepared", peer_class(request["peer"])
    made_with = " ".join(getattr(peer, "options", ()))
    if not done.exists() or done.read_text(encoding="utf8") != made_with:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        peer.prepare(Path(request["text_model"]), folder)
        done.write_text(made_with, encoding="utf8")
    return {"folder": str(folder)}


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Loads a prepared peer and times every prompt."""
    before_bytes = resident_memory_bytes()
    started = time.perf_counter()
    peer = peer_class(request["peer"])(Path(request["folder"]), request["threads"])
    load_s = time.perf_counter() - started
    clips = {}
    for name, path in request["prompts"].items():
        prompt = dict(np.load(path))
        clips[name] = _time_prompt(peer, prompt, request)
    return {
        "load_s": load_s,
        "clips": clips,
        "weight_bytes": peer.weight_bytes,
        "peak_memory_bytes": peak_memory_bytes(),
        "before_load_bytes": before_bytes,
        "versions": _versions(),
    }


def _prompt_timer(request: dict[str, Any]) -> Callable[[str], dict[str, float]]:
    """Loads a prepared peer; what times one of the request's prompts each time it is called.

    `new_tokens` is at least 2.
    """
    peer = peer_class(request["peer"])(Path(request["folder"]), request["threads"])
    prompts = {name: dict(np.load(path)) for name, path in request["prompts"].items()}
    count = request["new_tokens"]

    def timed(name: str) -> dict[str, float]:
        first_s, total_s, _ = peer.run(prompts[name], count)
        return {"ttft_ms": 1000 * first_s, "tpot_ms": 1000 * (total_s - first_s) / (count - 1)}

    return timed


def _time_prompt(peer: Any, prompt: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    count = request["new_tokens"]
    for _ in range(request["warmup"]):
        peer.run(prompt, count)
    runs = [peer.run(prompt, count) for _ in range(request["repeats"])]
    said = runs[0][2]
    if len(said) != count:
        raise SystemExit(f"{request['peer']} said {len(said)} tokens, not {count}")
    expected = prompt["tokens"][:count].tolist()
    pairs = zip(said, expected, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(count, len(expected)))
    return {
        "tokens": count,
        "prompt_positions": len(prompt["ids"]),
        "equal_tokens": equal,
        "ttft_ms": [1000 * first_s for first_s, _, _ in runs],
        "tpot_ms": [1000 * (total_s - first_s) / (count - 1) for first_s, total_s, _ in runs],
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Answers one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)  # What libraries print must not mix with the answer.
    request = json.loads(sys.stdin.readline())
    if request.get("turns"):
        answer_turns(_prompt_timer(request), answers)
        return 0
    answer = {"prepare": prepare, "measure": measure}[request["action"]](request)
    json.dump(answer, answers)
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
