"""Peak memory of a process, as the operating system saw it."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory_bytes(pid: int | None = None) -> int:
    """The most main memory that this process has held so far (peak resident set).

    With `pid`, another running process's; 0 where the system does not tell.

    Linux's VmHWM belongs to the running program; getrusage's ru_maxrss starts, after a fork and
    exec, at what the parent held, so that a child of a big process would look big.
    """
    if pid is not None:
        return _status_bytes("VmHWM", Path(f"/proc/{pid}/status")) or 0
    return _status_bytes("VmHWM") or _rusage_bytes()


def resident_memory_bytes() -> int:
    """The main memory that this process holds now."""
    return _status_bytes("VmRSS") or _rusage_bytes()


def peak_gpu_memory_bytes() -> int | None:
    """The most memory that torch held on the GPU (its pool, without CUDA's own); None where torch used none, as beside onnxruntime."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


def _status_bytes(field: str, status: Path = _STATUS) -> int | None:
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
