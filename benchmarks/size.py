"""Sizes: bytes on disk and parameters counted, which are never mixed.

A 4-bit checkpoint stores half a byte for a weight but has as many weights as before. `stored_bytes`
counts the bytes, `logical_parameters` the weights; papers that count packed tensors as parameters
report a number between the two.
"""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.artefact import TIMINGS, is_hidden
from halve.errors import ArtefactError
from halve.families import family_for
from halve.shards import spare_weights

_DTYPE_NAMES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}


@dataclass(frozen=True)
class Size:
    """What a model directory holds."""

    path: str
    stored_bytes: int
    logical_parameters: int
    decoder_layers: int
    precision: str
    target: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the whole directory for each logical parameter."""
        return 8 * self.stored_bytes / self.logical_parameters

    def record(self) -> dict[str, Any]:
        """The size as the benches' JSON holds it."""
        return {
            "path": self.path,
            "stored_bytes": self.stored_bytes,
            "logical_parameters": self.logical_parameters,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "decoder_layers": self.decoder_layers,
            "precision": self.precision,
            "target": self.target,
        }


def stored_bytes(directory: Path) -> int:
    """Bytes of the whole directory as it ships, tokenizer and all.

    Left out are the log of times, which changes from run to run and which no model needs, weights that
    a release has a second time for other software: nobody would ship both, and what a downloader keeps
    hidden (.git, .cache).
    Links (as in a hub cache) count as the files they lead to.
    """
    spare = {directory / name for name in spare_weights(directory)}
    return sum(
        entry.stat().st_size
        for entry in directory.rglob("*")
        if entry.is_file()
        and entry.name != TIMINGS
        and entry not in spare
        and not is_hidden(entry.relative_to(directory).as_posix())
    )


def measure(directory: Path, shown_path: str | None = None) -> Size:
    """Sizes of a student, teacher, stock checkpoint or package of any target.

    Raises:
        ArtefactError: no model of a known family in the directory.
    """
    package = _read(directory / "package.json") or {}
    if "logical_parameters" in package and "decoder_layers" in package:
        parameters, layers = package["logical_parameters"], package["decoder_layers"]
        precision = package.get("precision")
    else:
        config = model_config(directory)
        family = family_for(config)
        parameters, layers = family.count_parameters(config).total, family.num_layers(config)
        precision = package.get("precision") or checkpoint_precision(directory, config)
    return Size(
        path=shown_path or str(directory),
        stored_bytes=stored_bytes(directory),
        logical_parameters=int(parameters),
        decoder_layers=int(layers),
        precision=str(precision),
        target=package.get("target", "checkpoint"),
    )


def logical_parameters(directory: Path) -> int:
    """Weights of the model, each counted once, whatever the bits it is stored in."""
    return measure(directory).logical_parameters


def model_config(directory: Path) -> dict[str, Any]:
    """The Hugging Face config of a checkpoint, or the one that a package carries.

    Raises:
        ArtefactError: there is none.
    """
    config = _read(directory / "config.json")
    if config is None:
        raise ArtefactError(
            f"{directory} has no config.json",
            expected="a model directory or a package",
            mend="name a directory that `halve merge`, `halve prune` or `halve package` wrote",
        )
    return config


def checkpoint_precision(directory: Path, config: dict[str, Any]) -> str:
    """How most bytes of a checkpoint are stored: nf4, fp4, int8, bf16, fp16 or fp32."""
    quantization = config.get("quantization_config")
    if quantization:
        if quantization.get("load_in_4bit"):
            return str(quantization.get("bnb_4bit_quant_type", "nf4"))
        if quantization.get("load_in_8bit"):
            return "int8"
        return str(quantization.get("quant_method", "quantised"))
    stored: Counter[str] = Counter()
    spare = spare_weights(directory)
    for file in directory.glob("*.safetensors"):
        if file.name in spare:
            continue
        for entry in safetensors_header(file).values():
            start, end = entry["data_offsets"]
            stored[entry["dtype"]] += end - start
    if not stored:
        return str(config.get("dtype") or config.get("torch_dtype") or "unknown")
    dtype = stored.most_common(1)[0][0]
    return _DTYPE_NAMES.get(dtype, dtype.lower())


def safetensors_header(file: Path) -> dict[str, Any]:
    """Tensor entries of a safetensors file, read without its tensors.

    Raises:
        ArtefactError: not a safetensors file.
    """
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(min(length, 100_000_000)))
    except (ValueError, struct.error) as error:
        raise ArtefactError(f"{file}: not a safetensors file ({error})") from None
    header.pop("__metadata__", None)
    return dict(header)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ArtefactError(f"{path}: not JSON ({error})") from None
    return dict(value)
