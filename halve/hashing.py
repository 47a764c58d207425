"""SHA-256 of files: many at once, and never twice for a file that has not changed since.

A digest is remembered within the process alone. What was hashed while it was written is not read
again; a model that several steps take as their input is hashed once.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SETTLED_NS = 2_000_000_000
"""A file changed more recently than this might change again within one tick of the clock."""

_known: dict[tuple[int, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(path: Path, digest: str) -> None:
    """Notes the hash of a file that was hashed while it was written."""
    _known[_state(path)] = digest


def sha256_of(paths: Iterable[Path], *, fresh: bool = False) -> list[str]:
    """The hashes of files, several at a time.

    Args:
        fresh: reads every file, those too whose hash is known and which do not look changed.
    """
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_sha256 if fresh else _remembered, list(paths)))


def _remembered(path: Path) -> str:
    state = _state(path)
    if state not in _known:
        digest = file_sha256(path)
        if time.time_ns() - state[3] < _SETTLED_NS or _state(path) != state:
            return digest
        _known[state] = digest
    return _known[state]


def _state(path: Path) -> tuple[int, int, int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
