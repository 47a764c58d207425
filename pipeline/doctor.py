"""`halve doctor`: what this machine can run, and what is missing."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from halve import environment
from pipeline.console import Result, size, table


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: str
    """yes, no or limited."""
    found: str
    means: str


def _package(name: str, extra: str, means: str) -> Check:
    try:
        return Check(name, "yes", importlib.metadata.version(name), means)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "no", f"pip install 'halve[{extra}]'", means)


def _onnxruntime() -> Check:
    """Its build for GPUs is a distribution of another name, with the same files."""
    means = "running ONNX packages"
    for name in ("onnxruntime-gpu", "onnxruntime"):
        found = _package(name, "cpu", means)
        if found.state == "yes":
            return found
    return found


def _program(name: str, means: str, package: str = "") -> Check:
    place = shutil.which(name)
    how = place or f"apt-get install {package or name}"
    return Check(name, "yes" if place else "no", how, means)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    state = "yes" if sys.version_info >= (3, 11) else "no"
    return Check("python", state, version, "3.11 or newer")


def _cuda() -> Check:
    try:
        import torch
    except ImportError:
        return Check("cuda", "no", "torch is not installed", "training and search on a GPU")
    if not torch.cuda.is_available():
        return Check("cuda", "no", "no GPU that torch can use", "training and search on a GPU")
    memory = torch.cuda.get_device_properties(0).total_memory
    found = f"{torch.cuda.get_device_name(0)}, {size(memory)}"
    return Check("cuda", "yes", found, "training and search on a GPU")


def _memory() -> Check:
    whole = environment.memory_bytes()
    state = "yes" if whole >= 4e9 else "limited"
    found = f"{size(whole)}, {environment.cores()} cores, {environment.cpu_model()}"
    return Check(
        "memory",
        state,
        found,
        "4 GB run the demo; 7B models take 20 GB and more, 70 to teach one in full",
    )


def _bfloat16() -> Check:
    means = "16-bit training and 4-bit checkpoints at full speed; else float32 is computed in"
    try:
        device = "cuda" if _cuda().state == "yes" else "cpu"
        there = environment.computes_bfloat16(device)
    except ImportError:
        return Check("bfloat16", "no", "torch is not installed", means)
    found = f"units of the {'GPU' if device == 'cuda' else 'processor'}" if there else "no units"
    return Check("bfloat16", "yes" if there else "limited", found, means)


def _disk() -> Check:
    place = environment.runs_dir()
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    state = "yes" if free >= 2e9 and writable else "limited"
    found = f"{size(free)} free in {place}" + ("" if writable else ", not writable")
    return Check(
        "disk", state, found, "2 GB run the demo; 7B models take 60 GB, 200 to teach one in full"
    )


def _comet() -> Check:
    from benchmarks import comet_environment

    found = comet_environment.installed()
    how = str(found) if found else "halve doctor --install-comet"
    return Check("comet", "yes" if found else "no", how, "COMET scores, given a checkpoint")


def _demo() -> Check:
    place = Path("demo/teacher/config.json")
    found = "here" if place.is_file() else "not in this directory"
    return Check("demo model", "yes" if place.is_file() else "no", found, "make demo")


CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _memory,
    _disk,
    lambda: _package("torch", "cpu", "models, training, the importance search"),
    lambda: _package("transformers", "cpu", "model classes"),
    _cuda,
    _bfloat16,
    lambda: _package("peft", "train", "LoRA and QLoRA tuning"),
    lambda: _package("bitsandbytes", "train", "NF4 weights: QLoRA, nf4 packages"),
    lambda: _package("datasets", "train", "corpora from the Hugging Face hub"),
    _onnxruntime,
    lambda: _package("onnx", "export", "making ONNX packages"),
    lambda: _package("llama-cpp-python", "gguf", "making and running GGUF packages"),
    lambda: _package("fastapi", "serve", "the server"),
    lambda: _package("uvicorn", "serve", "the server"),
    lambda: _package("matplotlib", "bench", "plots in reports"),
    lambda: _package("mweralign", "longform", "scoring whole recordings"),
    lambda: _package("ray", "ray", "the importance search on several workers"),
    _comet,
    lambda: _program("ffmpeg", "serving audio that libsndfile does not read (m4a, webm)"),
    lambda: _program("espeak-ng", "making the whole demo corpus again"),
    lambda: _program("flite", "making the whole demo corpus again"),
    lambda: _program("opusenc", "making the whole demo corpus again", "opus-tools"),
    _demo,
)


def examine() -> Result:
    """Looks at everything; nothing here is an error."""
    found = [check() for check in CHECKS]
    rows = [[check.name, check.state, check.found, check.means] for check in found]
    text = table(["what", "there", "found / how to get it", "for"], rows)
    return Result(text, [vars(check) for check in found])
