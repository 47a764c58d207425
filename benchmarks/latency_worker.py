"""Times one model in a process of its own, so that load time and peak memory are its alone.

Run as `python -m benchmarks.latency_worker`: one JSON request on stdin, one JSON answer on stdout; or, where the
request has `turns`, an answer for every line after it (`benchmarks.turns`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bandwidth import read_bandwidth
from benchmarks.memory import peak_gpu_memory_bytes, peak_memory_bytes, resident_memory_bytes
from benchmarks.turns import answer_turns
from export.gguf_file import GGUF, decoder_bytes
from halve.audio import SAMPLE_RATE_HZ, FloatArray, read_audio
from halve.errors import HalveError
from halve.languages import token_limit

GPU_WARM_S = 5.0
"""A GPU translates for so long before anything is timed."""


@dataclass(frozen=True)
class Timing:
    """One translation of one clip, seconds from its start."""

    total_s: float
    first_s: float
    tokens: int
    """With the one that ended them, which took a step as the others did."""
    text: str
    first_tokens: int = 1
    """Tokens that stood at `first_s`: a first character may take several."""

    @property
    def token_s(self) -> float:
        """Time for each token after the first piece of text."""
        return (self.total_s - self.first_s) / max(1, self.tokens - self.first_tokens)


Run = Callable[[FloatArray, int], Timing]


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Loads the model, warms it up and times every clip; or measures memory's bandwidth.

    The parent has pinned the threads in this process's environment. Nothing heavy is imported
    before the clock starts: a runtime's imports are part of its load time and memory.
    """
    if request["backend"] == "bandwidth":
        return {"bytes_per_s": read_bandwidth(request["threads"])}
    clips = {name: read_audio(path) for name, path in request["clips"].items()}
    before_bytes = resident_memory_bytes()
    started = time.perf_counter()
    run, weight_bytes, device, arithmetic = (
        _stock(request) if request["backend"] == "stock" else _halve(request)
    )
    load_s = time.perf_counter() - started
    if device != "cpu":
        _warm(run, clips, request)
    timed = {name: _time_clip(run, audio, request) for name, audio in clips.items()}
    return {
        "load_s": load_s,
        "clips": timed,
        "peak_memory_bytes": peak_memory_bytes(),
        "before_load_bytes": before_bytes,
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
        "weight_bytes": weight_bytes(),
        "device": device,
        "arithmetic": arithmetic,
    }


def _warm(run: Run, clips: dict[str, FloatArray], request: dict[str, Any]) -> None:
    """Has a GPU come to its speed: the first clip was measured up to a third slower than the others without."""
    end = time.perf_counter() + GPU_WARM_S
    while time.perf_counter() < end:
        for audio in clips.values():
            run(audio, request.get("new_tokens") or token_limit(len(audio) / SAMPLE_RATE_HZ))


def _time_clip(run: Run, audio: FloatArray, request: dict[str, Any]) -> dict[str, Any]:
    duration_s = len(audio) / SAMPLE_RATE_HZ
    exactly = request.get("new_tokens")
    limit = exactly or token_limit(duration_s)
    for _ in range(request["warmup"]):
        run(audio, limit)
    timings = [run(audio, limit) for _ in range(request["repeats"])]
    if exactly and timings[0].tokens != exactly:
        raise HalveError(f"It said {timings[0].tokens} tokens", expected=f"{exactly}")
    return {
        "duration_s": duration_s,
        "tokens": timings[0].tokens,
        "text": timings[0].text,
        "ttft_ms": [1000 * timing.first_s for timing in timings],
        "tpot_ms": [1000 * timing.token_s for timing in timings],
        "rtf": [timing.total_s / duration_s for timing in timings],
    }


def _clip_timer(request: dict[str, Any]) -> Callable[[str], dict[str, float]]:
    """Opens a package or model of halve's; what times one of the request's clips each time it is called."""
    clips = {name: read_audio(path) for name, path in request["clips"].items()}
    run, *_ = _halve(request)

    def timed(name: str) -> dict[str, float]:
        timing = run(clips[name], request["new_tokens"])
        return {"ttft_ms": 1000 * timing.first_s, "tpot_ms": 1000 * timing.token_s}

    return timed


def _halve(request: dict[str, Any]) -> tuple[Run, Callable[[], int], str, str]:
    from export.runtime import open_translator

    path = Path(request["path"])
    translator = open_translator(path, threads=request["threads"])
    lang: str = request["lang"]
    run = _exact_run if request.get("new_tokens") else _stream_run
    speech = getattr(translator, "speech", None)
    device = getattr(translator, "device", "cpu") if speech is None else speech.device
    return (
        run(translator, lang),
        lambda: _weight_bytes(translator, path),
        _kind(device),
        _arithmetic(path, speech),
    )


def _arithmetic(path: Path, speech: Any) -> str:
    """What is computed in: torch unpacks weights in few bits to it, onnxruntime and llama.cpp round states to 8 bits beside them."""
    if speech is not None:
        return str(speech.dtype)
    manifest = json.loads((path / "package.json").read_text(encoding="utf8"))
    named = {"fp16": "float16", "int8": "int8", "int4": "int8"}
    return named.get(manifest["precision"], "float32")


def _kind(device: object) -> str:
    """cpu or cuda."""
    return str(device).partition(":")[0]


def _stream_run(translator: Any, lang: str) -> Run:
    def run(audio: FloatArray, limit: int) -> Timing:
        started = time.perf_counter()
        first_s = 0.0
        pieces: list[str] = []
        stream = translator.stream(audio, lang, limit=limit)
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                said = end.value.tokens
                tokens = len(said) + (end.value.stopped == "end")
                break
            first_s = first_s or time.perf_counter() - started
        total_s = time.perf_counter() - started
        shown = _until_text(translator, said) if first_s else tokens
        return Timing(total_s, first_s or total_s, tokens, "".join(pieces), shown)

    return run


def _text_of(translator: Any) -> Callable[[Sequence[int]], str]:
    """What makes text of tokens: packages and models on torch call it differently."""
    text: Callable[[Sequence[int]], str] = getattr(translator, "text", None) or translator.decode
    return text


def _until_text(translator: Any, tokens: Sequence[int]) -> int:
    """How many tokens it takes until there is text to show."""
    from halve.translate import TextStream

    stream = TextStream(_text_of(translator))
    counts = range(1, len(tokens) + 1)
    return next((count for count in counts if stream.push(tokens[:count])), max(1, len(tokens)))


def _exact_run(translator: Any, lang: str) -> Run:
    """Times every token as it is chosen: a piece of text may take several."""
    say = _package_tokens if hasattr(translator, "open_batch") else _torch_tokens
    text = _text_of(translator)

    def run(audio: FloatArray, limit: int) -> Timing:
        times_s: list[float] = []
        started = time.perf_counter()
        tokens = say(translator, audio, lang, limit, lambda: times_s.append(time.perf_counter()))
        first_s, total_s = times_s[0] - started, times_s[-1] - started
        return Timing(total_s, first_s, len(tokens), text(tokens))

    return run


def _package_tokens(
    package: Any, audio: FloatArray, lang: str, limit: int, chosen: Callable[[], None]
) -> list[int]:
    """What a package on onnxruntime or llama.cpp says; tells of each token when it is chosen."""
    inputs = package.inputs(audio, lang)
    batch = package.open_batch(1, len(inputs) + limit)
    row = batch.add(inputs, limit)
    chosen()
    while not row.stopped:
        batch.step()
        chosen()
    tokens: list[int] = row.tokens
    return tokens


def _torch_tokens(
    translator: Any, audio: FloatArray, lang: str, limit: int, chosen: Callable[[], None]
) -> list[int]:
    """What a model on torch says; tells of each token when it is chosen."""

    def gone(_: int) -> bool:
        chosen()  # asked after every token but the last
        return False

    heard = translator.encode_all([audio])
    found = translator.translate_embeddings(heard, lang, limits=[limit], gone=gone)
    chosen()
    tokens: list[int] = found[0].tokens
    return tokens


def _weight_bytes(translator: Any, path: Path) -> int:
    """Bytes of weights that decoding a token reads."""
    if (path / "decoder.onnx").is_file():
        from benchmarks.peers_onnx import read_bytes

        return read_bytes(path / "decoder.onnx")
    if (path / GGUF).is_file():
        return decoder_bytes(path / GGUF)
    from benchmarks.baseline import decoder_weight_bytes
    from halve.families import FAMILIES

    return decoder_weight_bytes(translator.speech.model, FAMILIES[translator.family])


def _stock(request: dict[str, Any]) -> tuple[Run, Callable[[], int], str, str]:
    from benchmarks.baseline import StockModel

    model = StockModel(
        Path(request["path"]), request["precision"], cut_audio=request.get("cut_audio", False)
    )
    lang: str = request["lang"]
    exactly = bool(request.get("new_tokens"))

    def run(audio: FloatArray, limit: int) -> Timing:
        started = time.perf_counter()
        tokens, times_s = model.generate(audio, lang, limit, exactly=exactly)
        total_s = time.perf_counter() - started
        first_s = times_s[0] - started if times_s else total_s
        return Timing(total_s, first_s, len(tokens), model.text(tokens))

    dtype = str(model.model.dtype).removeprefix("torch.")
    return run, model.weight_bytes, _kind(model.model.device), dtype


def main() -> int:
    """Answers one request; a user's mistake is one line on stderr and exit 2."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)  # What libraries print must not mix with the answer.
    try:
        request = json.loads(sys.stdin.readline())
        if request.get("turns"):
            answer_turns(_clip_timer(request), answers)
            return 0
        answer = measure(request)
    except HalveError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    json.dump(answer, answers)
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
