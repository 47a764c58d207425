"""How fast this machine reads memory: the limit of decoding, which reads every weight for each token.

A dot product of a buffer with itself reads each byte once and does next to nothing with it. Buffers
far beyond the last cache give the bandwidth of main memory; smaller ones that of the cache they fit.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIZES_BYTES = tuple(size << 20 for size in (4, 8, 16, 32, 64, 128, 512, 1024))
_BUDGET_BYTES = 4 << 30
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def read_bandwidth(threads: int, sizes_bytes: tuple[int, ...] = SIZES_BYTES) -> dict[int, float]:
    """Bytes a second read from a buffer of each size, the best of several passes.

    BLAS must be pinned to one thread: each of `threads` threads reads a part of its own.
    """
    found = {}
    for size_bytes in sizes_bytes:
        buffer = np.ones(size_bytes // 4, np.float32)
        parts = np.array_split(buffer, threads)
        passes = max(3, min(64, _BUDGET_BYTES // (8 * size_bytes)))
        with ThreadPoolExecutor(threads) as pool:
            times_s = [_timed(pool, parts) for _ in range(passes)]
        found[size_bytes] = size_bytes / min(times_s)
    return found


def _timed(pool: ThreadPoolExecutor, parts: list[np.ndarray]) -> float:
    started = time.perf_counter()
    list(pool.map(_read, parts))
    return time.perf_counter() - started


def _read(part: np.ndarray) -> float:
    # In blocks: one call stays within BLAS, which lets other threads run meanwhile.
    return float(sum(np.dot(b, b) for b in _blocks(part)))


def _blocks(part: np.ndarray) -> list[np.ndarray]:
    step = 1 << 20
    return [part[start : start + step] for start in range(0, len(part), step)]


def bandwidth_for(size_bytes: int, measured: Mapping[int, float]) -> float:
    """The bandwidth of the smallest measured buffer that is no smaller; of the largest beyond."""
    fitting = [size for size in measured if size >= size_bytes]
    return measured[min(fitting) if fitting else max(measured)]


def last_cache_bytes() -> int | None:
    """Size of the last-level cache; None where the system does not tell."""
    sizes = [path.read_text(encoding="ascii").strip() for path in _CACHES.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=None)
