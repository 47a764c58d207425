"""Safetensors checkpoints read tensor by tensor, and piece by piece: no file is ever mapped or held."""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.errors import ArtefactError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PIECE_BYTES = 8_000_000
"""Weights are read, changed, hashed and written in pieces of about so many bytes."""
TORCH_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Names of types in a file's header, and torch's names for them."""

GENERATION = "generation_config.json"

_SAMPLING = {
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
    "repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "sequence_bias", "bad_words_ids", "min_length", "min_new_tokens",
}  # fmt: skip
"""Settings that greedy decoding does not read (transformers warns of them beside do_sample: false), and those under
which stock `generate` would not say what halve measured."""
_LONGEST_HEADER = 100_000_000
FOREIGN_WEIGHTS = (
    ".h5",
    ".msgpack",
    ".ot",
    ".ckpt",
    ".tflite",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".data",
    ".pth",
)
"""Endings of weights that halve reads from no model directory: other frameworks' copies of the same."""
WEIGHTS = (".safetensors", ".bin", ".pt", *FOREIGN_WEIGHTS)
"""Endings of all files that hold weights."""
_NOT_CARRIED = {
    "config.json",
    "artefact.json",
    "timings.jsonl",
    "partial.json",
    "package.json",
    "merge.json",
    "README.md",
    "history.jsonl",
    INDEX,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    key: str
    file: Path
    kind: str
    """Its type as the header names it: BF16, F32, …"""
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file."""
    size_bytes: int

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[memoryview]:
        """Its bytes as they are.

        Raises:
            ArtefactError: the file ends too early.
        """
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.begin)
            for done in range(0, self.size_bytes, piece_bytes):
                yield self._read(file, min(piece_bytes, self.size_bytes - done))

    def rows(self, piece_bytes: int = PIECE_BYTES) -> "Iterator[tuple[int, torch.Tensor]]":
        """The tensor in pieces along its first dimension: the first row's number, and the rows."""
        import torch

        dtype = getattr(torch, self._torch_type())
        if not self.shape or not self.size_bytes:
            yield 0, self.tensor()
            return
        row_bytes = self.size_bytes // self.shape[0]
        step = max(1, piece_bytes // row_bytes)
        for number, piece in enumerate(self.pieces(step * row_bytes)):
            rows = torch.frombuffer(piece, dtype=dtype)
            yield number * step, rows.reshape(-1, *self.shape[1:])

    def tensor(self) -> "torch.Tensor":
        """The whole tensor, in memory of its own."""
        import torch

        dtype = getattr(torch, self._torch_type())
        if not self.size_bytes:
            return torch.empty(self.shape, dtype=dtype)
        (piece,) = self.pieces(self.size_bytes)
        return torch.frombuffer(piece, dtype=dtype).reshape(self.shape)

    def _torch_type(self) -> str:
        if self.kind not in TORCH_TYPES:
            raise ArtefactError(
                f"{self.file}: {self.key} is of type {self.kind}",
                expected=f"one of {', '.join(TORCH_TYPES)}",
            )
        return TORCH_TYPES[self.kind]

    def _read(self, file: Any, size: int) -> memoryview:
        buffer = memoryview(bytearray(size))
        done = 0
        while done < size:
            found = file.readinto(buffer[done:])
            if not found:
                raise _damaged(self.file, "it ends too early")
            done += found
        return buffer


def read_index(model: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        ArtefactError: no safetensors weights, or a shard missing or damaged.
    """
    # As stock code: an index beside a whole file may be of an earlier model in the same folder.
    if (model / INDEX).is_file() and not (model / SINGLE).is_file():
        index = _weight_map(model / INDEX)
        missing = sorted({name for name in index.values() if not (model / name).is_file()})
        if missing:
            raise ArtefactError(
                f"{model}: shards missing: {', '.join(missing)}", mend="copy them again"
            )
        return index
    if not (model / SINGLE).is_file():
        raise ArtefactError(f"{model} has no safetensors weights", expected=f"{SINGLE} or {INDEX}")
    return dict.fromkeys(read_header(model / SINGLE), SINGLE)


def spare_weights(model: Path) -> frozenset[str]:
    """Files of weights that loading leaves alone: other forms of those that lie in safetensors.

    By name, those of sub-folders (`original/consolidated.00.pth`) with their folder.

    Raises:
        ArtefactError: a shard missing or damaged.
    """
    if not ((model / INDEX).is_file() or (model / SINGLE).is_file()):
        return frozenset()
    used = set(read_index(model).values())
    found = (entry for entry in model.rglob("*") if entry.suffix in WEIGHTS)
    weights = {entry.relative_to(model).as_posix() for entry in found}
    return frozenset(weights - used)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf8"))
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(one, str) for one in files.values()):
            raise ValueError("it does not say which tensor is in which file")
        if any(".." in Path(name).parts or Path(name).is_absolute() for name in files.values()):
            raise ValueError("it names files outside the model's directory")
    except ValueError as error:
        raise ArtefactError(
            f"{path} is damaged ({error})",
            expected="an object with the file of each tensor under weight_map",
            mend="copy it again",
        ) from None
    return files


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes.

    Format: 8 bytes of length, a JSON header, the tensors' bytes without gaps
    (huggingface.co/docs/safetensors).

    Raises:
        ArtefactError: it is no whole safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, _LONGEST_HEADER):
            raise _damaged(path, "its header is cut off")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_stored(path, key, entry, 8 + length) for key, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from None
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.size_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.begin != end:
            raise _damaged(path, f"{tensor.key} is not where its header says")
        end += tensor.size_bytes
    if end != size:
        raise _damaged(path, f"{size} bytes, its header says {end}")
    return {tensor.key: tensor for tensor in tensors}


def _stored(path: Path, key: str, entry: dict[str, Any], base: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    kind = str(entry["dtype"])
    if kind in TORCH_TYPES and math.prod(shape) * element_bytes(kind) != end - begin:
        raise ValueError(f"{key} has {end - begin} bytes for {shape} of {kind}")
    return Stored(key, path, kind, shape, base + begin, end - begin)


def element_bytes(kind: str) -> int:
    """Bytes of one number of a type, by the header's name for it."""
    bits = "8" if kind == "BOOL" else kind.lstrip("BFIU")
    return int(bits) // 8


def _damaged(path: Path, why: str) -> ArtefactError:
    return ArtefactError(
        f"{path} is damaged ({why})",
        expected="a whole safetensors file",
        mend="copy or make it again",
    )


def iter_stored(model: Path) -> Iterator[Stored]:
    """All tensors, a file at a time, in the order of their bytes: reading them all is one pass.

    Raises:
        ArtefactError: weights missing or damaged, or a file that lacks what the index promises.
    """
    index = read_index(model)
    for name in sorted(set(index.values())):
        found = read_header(model / name)
        lacking = sorted(key for key, file in index.items() if file == name and key not in found)
        if lacking:
            raise _damaged(model / name, f"{', '.join(lacking[:3])} should be in it")
        yield from (tensor for key, tensor in found.items() if index.get(key) == name)


def tensor_shapes(model: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and stored type of each tensor, from the files' headers alone."""
    return {tensor.key: (tensor.shape, tensor.kind) for tensor in iter_stored(model)}


def half_bytes(model: Path) -> int:
    """Bytes of the tensors that are stored in 16 bits, from the files' headers alone."""
    shapes = tensor_shapes(model).values()
    return sum(2 * math.prod(shape) for shape, kind in shapes if kind in ("BF16", "F16"))


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies what a model directory has beside weights, config and records: tokenizer and processor,
    and its generation config, made greedy."""
    copied = []
    for entry in sorted(source.iterdir()):
        is_weights = entry.suffix in WEIGHTS or ".index." in entry.name  # .index.fp32.json, too
        if entry.is_file() and entry.name not in _NOT_CARRIED and not is_weights:
            shutil.copyfile(entry, target / entry.name)
            copied.append(entry.name)
    if GENERATION in copied:
        _make_greedy(target / GENERATION)
    return copied


def _make_greedy(path: Path) -> None:
    """Translations are measured and compared as greedy decoding makes them: no sampling, one beam."""
    try:
        settings = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise ArtefactError(
            f"{path.name} is damaged ({error})",
            expected="an object of settings",
            mend="copy it again from where the model is from",
        ) from None
    greedy = {key: value for key, value in settings.items() if key not in _SAMPLING}
    greedy |= {"do_sample": False, "num_beams": 1}
    if greedy != settings:
        path.write_text(json.dumps(greedy, indent=2, sort_keys=True) + "\n", encoding="utf8")


def write_config(target: Path, config: dict[str, Any]) -> None:
    """Writes config.json as transformers does."""
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf8")
