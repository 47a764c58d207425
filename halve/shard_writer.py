"""Writes safetensors shards in one pass: each piece is hashed and written while the next is made.

The header stands at the front of a file and its hash covers it, so that every tensor's type and shape
must be known beforehand; their contents are asked for one after the other and never held together.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from halve import hashing
from halve.shards import INDEX, SINGLE, Stored

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 1_000_000_000
_IN_FLIGHT = 4
"""Pieces that may wait for the hash or the disk: what bounds the memory."""
_FLUSH_BYTES = 256_000_000
"""After so many bytes the disk is told to begin: what is left to flush at the end is little."""


@dataclass(frozen=True)
class Part:
    """A tensor to be written."""

    key: str
    kind: str
    """Its type as a header names it."""
    shape: tuple[int, ...]
    size_bytes: int
    pieces: Callable[[], Iterable[memoryview]]
    """Its bytes, in order. Called once, after those of all parts before it."""


def unchanged(stored: Stored, key: str | None = None) -> Part:
    """A tensor of another checkpoint as it is, under another key where one is given."""
    return Part(key or stored.key, stored.kind, stored.shape, stored.size_bytes, stored.pieces)


def raw(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a tensor."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_shards(
    folder: Path, parts: Iterable[Part], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[Path, str]:
    """Writes parts into files of bounded size, and the index; one file when one is enough.

    Returns:
        the files of weights and the SHA-256 of the bytes that were handed to the disk, which are remembered.

    Raises:
        OSError: the disk is full or fails.
    """
    shards = _split(parts, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    written = {}
    for name, shard in zip(names, shards, strict=True):
        written[folder / name] = _write(folder / name, shard)
    if len(shards) > 1:
        _write_index(folder, dict(zip(names, shards, strict=True)))
    return written


def _split(parts: Iterable[Part], limit: int) -> list[list[Part]]:
    """Parts in their order; a new shard where the next one would not fit."""
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if shards[-1] and filled + part.size_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += part.size_bytes
    return shards


def _write_index(folder: Path, shards: dict[str, list[Part]]) -> None:
    weight_map = {part.key: name for name, shard in shards.items() for part in shard}
    total = sum(part.size_bytes for shard in shards.values() for part in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")


def _write(path: Path, shard: Sequence[Part]) -> str:
    with _HashedFile(path) as file:
        file.write(memoryview(_header(shard)))
        for part in shard:
            written = 0
            for piece in part.pieces():
                written += piece.nbytes
                file.write(piece)
            if written != part.size_bytes:
                raise ValueError(f"{part.key}: {written} bytes made, {part.size_bytes} announced")
    return file.digest


def _header(shard: Sequence[Part]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for part in shard:
        offsets = [begin, begin + part.size_bytes]
        entries[part.key] = {"dtype": part.kind, "shape": part.shape, "data_offsets": offsets}
        begin += part.size_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _HashedFile:
    """A file written and hashed by a thread each, which the caller's next piece does not wait for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._digest = hashlib.sha256()
        self._hasher, self._writer, self._flusher = (ThreadPoolExecutor(1) for _ in range(3))
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self.digest = ""
        """Of the whole file, once it is closed."""

    def __enter__(self) -> "_HashedFile":
        return self

    def write(self, piece: memoryview) -> None:
        """Hands over a piece, which must not be changed afterwards."""
        while len(self._pending) >= _IN_FLIGHT:
            self._wait()
        hashed = self._hasher.submit(self._digest.update, piece)
        self._pending.append((hashed, self._writer.submit(self._store, piece)))

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def _store(self, piece: memoryview) -> None:
        done = 0
        while done < piece.nbytes:
            done += self._file.write(piece[done:]) or 0
        self._unflushed += piece.nbytes
        if self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._unflushed = 0
            self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                while self._pending:
                    self._wait()
                if self._flush is not None:
                    self._flush.result()
        finally:
            for pool in (self._hasher, self._writer, self._flusher):
                pool.shutdown(cancel_futures=True)
            self._file.close()
        if kind is None:
            self.digest = self._digest.hexdigest()
            hashing.remember(self._path, self.digest)
