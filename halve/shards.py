"""Safetensors checkpoints tensor by tensor: never more than one output shard in memory."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.errors import ArtefactError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 1_000_000_000

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".data")
_NOT_CARRIED = {
    "config.json",
    "artefact.json",
    "timings.jsonl",
    "README.md",
    "history.jsonl",
    INDEX,
}


def read_index(model: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        ArtefactError: no safetensors weights, or a shard missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if (model / INDEX).is_file():
        try:
            index: dict[str, str] = json.loads((model / INDEX).read_text(encoding="utf8"))[
                "weight_map"
            ]
        except (ValueError, KeyError) as error:
            raise ArtefactError(f"{model / INDEX} is damaged ({error})") from None
        missing = sorted({name for name in index.values() if not (model / name).is_file()})
        if missing:
            raise ArtefactError(
                f"{model}: shards missing: {', '.join(missing)}", mend="copy them again"
            )
        return index
    if not (model / SINGLE).is_file():
        raise ArtefactError(f"{model} has no safetensors weights", expected=f"{SINGLE} or {INDEX}")
    try:
        with safe_open(str(model / SINGLE), framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except SafetensorError as error:
        raise _damaged(model / SINGLE, error) from None


def _damaged(path: Path, error: BaseException) -> ArtefactError:
    return ArtefactError(
        f"{path} is damaged ({error})",
        expected="a whole safetensors file",
        mend="copy or make it again",
    )


def iter_tensors(model: Path) -> "Iterator[tuple[str, torch.Tensor]]":
    """All tensors, a file at a time, in the order of their names within it."""
    from safetensors import SafetensorError, safe_open

    by_file: dict[str, list[str]] = {}
    for key, name in read_index(model).items():
        by_file.setdefault(name, []).append(key)
    for name in sorted(by_file):
        try:
            with safe_open(str(model / name), framework="pt") as file:
                for key in sorted(by_file[name]):
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise _damaged(model / name, error) from None


def tensor_shapes(model: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and stored type of each tensor, from the files' headers alone."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    index = read_index(model)
    for name in sorted(set(index.values())):
        try:
            with safe_open(str(model / name), framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    shapes[key] = (tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise _damaged(model / name, error) from None
    return shapes


class ShardWriter:
    """Writes tensors into shards of bounded size, then the index; one file when one is enough."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[dict[str, int]] = []

    def add(self, key: str, tensor: "torch.Tensor") -> None:
        """Takes one tensor; writes a shard when it is full."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[key] = tensor.contiguous()
        self._pending_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        number = len(self._shards) + 1
        save_file(self._pending, str(self._folder / f"shard-{number}"), metadata={"format": "pt"})
        self._shards.append({key: t.numel() * t.element_size() for key, t in self._pending.items()})
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> list[Path]:
        """Writes what is left and the index; returns the files of weights."""
        if self._pending:
            self._flush()
        if len(self._shards) == 1:
            return [(self._folder / "shard-1").rename(self._folder / SINGLE)]
        weight_map: dict[str, str] = {}
        files = []
        for number, keys in enumerate(self._shards, start=1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            files.append((self._folder / f"shard-{number}").rename(self._folder / name))
            weight_map.update(dict.fromkeys(keys, name))
        total = sum(size for keys in self._shards for size in keys.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")
        return files


def copy_shards(
    source: Path,
    target: Path,
    rename: Callable[[str], str | None],
    transform: "Callable[[str, torch.Tensor], torch.Tensor] | None" = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Copies a checkpoint's tensors under new names; those renamed to None stay behind.

    Args:
        transform: called with the old name and the tensor; returns the tensor to write.
    """
    writer = ShardWriter(target, max_shard_bytes)
    for key, tensor in iter_tensors(source):
        new = rename(key)
        if new is not None:
            writer.add(new, tensor if transform is None else transform(key, tensor))
    return writer.close()


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies what a model directory has beside weights and config: tokenizer, processor, generation config."""
    copied = []
    for entry in sorted(source.iterdir()):
        if entry.is_file() and entry.name not in _NOT_CARRIED and entry.suffix not in _WEIGHTS:
            shutil.copyfile(entry, target / entry.name)
            copied.append(entry.name)
    return copied


def write_config(target: Path, config: dict[str, Any]) -> None:
    """Writes config.json as transformers does."""
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf8")
