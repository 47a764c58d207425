"""What runs here: versions, machine, threads. The one place that reads the environment."""

import gc
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGES = (
    "halve",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx",
    "llama-cpp-python",
    "safetensors",
    "sacrebleu",
    "numpy",
    "soundfile",
    "soxr",
    "mweralign",
)
WEIGHTS_SHARE = 0.8
"""Of a device's memory: the most that weights widened to 32 bits may take."""


_MEMORY_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
"""Where Linux tells a container's limit (control groups 2 and 1)."""


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def halve_version() -> str:
    """The version of halve itself; its stages are run again when it changes."""
    return versions().get("halve", "0+source")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


_INSTRUCTIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
"""Of x86 and ARM: which of these a processor has decides how fast, and in what numbers, it computes."""


@cache
def instructions() -> tuple[str, ...]:
    """Those instruction sets that this processor has; two of one name may differ in them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf8").splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    known = set(flags.partition(":")[2].split())
    return tuple(name for name in _INSTRUCTIONS if name in known)


def memory_bytes() -> int:
    """The main memory that this process may use: the machine's, or its container's where that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(limit for path in _MEMORY_LIMITS if (limit := _number(path)))])


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text(encoding="utf8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def cores() -> int:
    """The cores this process may use; in a container as many as its quota of processor time is worth, rounded up."""
    known = hasattr(os, "sched_getaffinity")
    found = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    quota = _cpu_quota()
    return found if quota is None else max(1, min(found, math.ceil(quota)))


def _cpu_quota() -> float | None:
    """What a container may use of the processor, in cores; None without a limit (control groups 2 and 1)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    first, second = (
        _number(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")
    )
    return first / second if first and second else None  # a quota of -1 is none, and no number here


@cache
def default_threads() -> int:
    """The threads that torch would compute with, as first asked: later a thread's own setting may answer."""
    return min(threads(), cores())


def find_ffmpeg() -> str | None:
    """Where ffmpeg is, if it is installed: the system's, else that of the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator: for timings, never for hashes."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "instructions": list(instructions()),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "gpu": None,
    }
    import torch

    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def measured_on() -> dict[str, Any]:
    """What a timing depends on beside its settings: it is on the record of benches that time, and decides whether one is current."""
    names = (
        "torch",
        "transformers",
        "onnxruntime",
        "onnxruntime-gpu",
        "llama-cpp-python",
        "bitsandbytes",
    )
    known = versions()
    keys = ("cpu", "instructions", "cores", "gpu")
    facts = {key: value for key, value in machine().items() if key in keys}
    return {"measured_on": facts | {name: known[name] for name in names if name in known}}


def gpu_in_use() -> dict[str, str]:
    """The GPU that torch has computed on in this process, as {"gpu": name}; nothing where it has not."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"gpu": str(torch.cuda.get_device_name(0))}


def leave_out_cudnn_attention() -> None:
    """Keeps torch from handing masked attention to cuDNN, which it prefers on Hopper GPUs and later.

    There it fails on masks of some lengths (float masks, H200, torch 2.11), and is known to give NaN gradients
    (pytorch issue 196678) and other texts (193893). Flash, memory-efficient and plain attention stay.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def release_gpu_memory() -> None:
    """Gives the GPU memory that torch keeps for later back: other processes and libraries may want it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def threads() -> int:
    """The threads that torch computes with."""
    import torch

    return torch.get_num_threads()


def pin_threads(count: int) -> None:
    """Computes with exactly `count` threads from now on."""
    import torch

    torch.set_num_threads(count)


@cache
def computes_bfloat16(device: str) -> bool:
    """Whether a device has units for bfloat16; a CPU without them takes tens of times as long as in float32.

    Args:
        device: cpu, cuda, cuda:N or split.
    """
    import torch

    if device.partition(":")[0] in ("cuda", "split"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    there: bool = torch.backends.mkldnn.is_available()
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def weights_room(device: str) -> int:
    """Bytes that weights in 32 bits may take on a device: a share of its memory, of all GPUs' for split."""
    return int(WEIGHTS_SHARE * device_bytes(device))


def device_bytes(device: str) -> int:
    """The memory of a device as `pick_device` names it: of the machine, a GPU, or for split of all of them."""
    kind, _, number = device.partition(":")
    if kind not in ("cuda", "split"):
        return memory_bytes()
    import torch

    places = range(torch.cuda.device_count()) if kind == "split" else [int(number or 0)]
    return sum(torch.cuda.get_device_properties(each).total_memory for each in places)


def quick_dtype(device: str, stored_bytes: int = 0) -> str:
    """bfloat16 where a device has units for it, else float32.

    Args:
        device: as `computes_bfloat16` takes it.
        stored_bytes: of weights in 16 bits; where the device cannot hold them twice, they stay bfloat16.
    """
    if computes_bfloat16(device) or 2 * stored_bytes > weights_room(device):
        return "bfloat16"
    return "float32"


def runs_dir() -> Path:
    """Where results go when no --out is given (HALVE_RUNS, else runs/ here)."""
    return Path(os.environ.get("HALVE_RUNS", "runs"))
