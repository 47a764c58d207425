"""`halve plan`: which students fit into a number of bytes, from the config alone.

Kept layers and precision are combined, sizes computed from the exact parameter counts. Which of them
translates best is not known here: that is measured with importance, tune and bench.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.errors import InputError
from halve.families import family_for
from halve.families.base import Counts
from halve.languages import language
from halve.models import read_config, resolve_model
from pipeline.console import Result, size, table
from pipeline.costs import NF4_BYTES

_WEIGHTS = (".safetensors", ".bin", ".onnx", ".data")

# Bytes of a parameter: decoder layers; all the rest. int4 and int8 hold a scale for 32 weights.
PRECISIONS: tuple[tuple[str, str, float, float], ...] = (
    ("checkpoint bf16", "bfloat16 everywhere", 2.0, 2.0),
    ("onnx int8", "8 bits everywhere", 1.06, 1.06),
    ("checkpoint nf4", "NF4 in the decoder, the rest bfloat16", NF4_BYTES, 2.0),
    ("onnx int4", "4 bits in decoder, embeddings and head, 8 in the encoder", 0.63, 0.63),
)

_UNITS = {
    "": 1.0,
    "b": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


@dataclass(frozen=True)
class Choice:
    """One student that fits."""

    layers: int
    package: str
    parameters: int
    stored_bytes: float
    note: str


def parse_bytes(text: str) -> float:
    """4GB, 500 MB, 3.5GiB.

    Raises:
        InputError: no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", text.lower())
    try:
        return float(match[1]) * _UNITS[match[2]]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{text!r} is no size", expected="for example 4GB or 500MB") from None


def choices(config: dict[str, Any], budget_bytes: float, side_bytes: float = 0.0) -> list[Choice]:
    """For each precision, the most layers that fit; least compressed first."""
    family = family_for(config)
    whole = family.num_layers(config)
    found = []
    for package, note, decoder_bytes, other_bytes in PRECISIONS:
        for layers in range(whole, 1, -1):
            counts = family.count_parameters(family.kept_config(config, list(range(layers))))
            stored = _stored(counts, package, decoder_bytes, other_bytes) + side_bytes
            if stored <= budget_bytes:
                found.append(Choice(layers, package, counts.total, stored, note))
                break
    return sorted(found, key=lambda choice: -choice.layers)


def _stored(counts: Counts, package: str, decoder_bytes: float, other_bytes: float) -> float:
    stored = counts.decoder * decoder_bytes + (counts.total - counts.decoder) * other_bytes
    if package == "onnx int4":
        stored += counts.audio_tower * (1.06 - other_bytes)
    return stored


def plan(model: str, budget: str, lang: str | None) -> Result:
    """The choices as a table.

    Raises:
        InputError: no size, an unknown language, or nothing fits.
    """
    budget_bytes = parse_bytes(budget)
    if lang is not None:
        language(lang)
    place = resolve_model(model)
    config = read_config(place)
    side_bytes = _side_bytes(place)
    found = choices(config, budget_bytes, side_bytes)
    whole = family_for(config).count_parameters(config)
    if not found:
        raise InputError(
            f"Nothing of {model} fits into {size(budget_bytes)}",
            expected=f"more: two layers at 4 bits take {size(_smallest(config) + side_bytes)}",
        )
    rows = [
        [
            str(one.layers),
            str(whole.decoder_layers - one.layers),
            one.package,
            f"{one.parameters:,}",
            size(one.stored_bytes),
            one.note,
        ]
        for one in found
    ]
    header = ["layers", "remove", "package", "parameters", "stored", "what"]
    text = table(header, rows, right=(0, 1, 3, 4))
    title = f"{model}: {whole.total:,} parameters in {whole.decoder_layers} layers; what fits into {size(budget_bytes)} (computed, not measured):"
    data = {
        "model": model,
        "logical_parameters": whole.total,
        "budget_bytes": budget_bytes,
        "choices": [vars(one) for one in found],
    }
    return Result(f"{title}\n{text}", data)


def _side_bytes(model: Path) -> float:
    """Tokenizer, processor and other small files, which every package carries."""
    kept = (path for path in model.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
    return float(sum(path.stat().st_size for path in kept))


def _smallest(config: dict[str, Any]) -> float:
    family = family_for(config)
    counts = family.count_parameters(family.kept_config(config, [0, 1]))
    return _stored(counts, "onnx int4", 0.63, 0.63)
