"""Checkpoints for stock transformers, written piece by piece: the model is never held."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import nf4
from halve.errors import ArtefactError
from halve.families import Family, family_for
from halve.model_checks import check_tied_head
from halve.models import quantization_config, read_config
from halve.shard_writer import Part, raw, unchanged, write_shards
from halve.shards import (
    TORCH_TYPES,
    Stored,
    copy_side_files,
    element_bytes,
    iter_stored,
    tensor_shapes,
    write_config,
)

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_KINDS = {name: kind for kind, name in TORCH_TYPES.items()}
_FLOATS = {"F64", "F32", "F16", "BF16"}

_ROWS = 1024

Rows = Callable[[], "Iterator[torch.Tensor]"]
"""Makes a tensor's new values: its rows in order, some at a time."""
Change = Callable[[Stored], Rows | None]
"""What becomes of a tensor's values; None where they stay."""


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says which type its weights are stored in, in its parts too."""
    new = copy.deepcopy(config)
    new.pop("torch_dtype", None)
    new["dtype"] = dtype
    for part in new.values():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
    return new


def write_plain(
    source: Path,
    target: Path,
    dtype: str,
    max_shard_bytes: int,
    change: Change = lambda stored: None,
) -> None:
    """Copies a model directory with its weights in another type.

    Raises:
        ArtefactError: weights missing, damaged, stored in 4 bits, or not finite in that type.
    """
    config = _plain_config(source)
    kept = _read_by_stock_code(source, config)
    parts = [_part(stored, _KINDS[dtype], change(stored)) for stored in kept]
    write_shards(target, parts, max_shard_bytes)
    copy_side_files(source, target)
    write_config(target, with_dtype(config, dtype))


def mean_of_models(models: Sequence[Path]) -> Change:
    """Makes of a tensor of the first model its mean over all; changes nothing where there is but one.

    Raises:
        ArtefactError: they do not have the same tensors.
    """
    first, *others = models
    shapes = _read_shapes(first)
    for other in others:
        found = _read_shapes(other)
        differing = [
            key
            for key in sorted({**shapes, **found})
            if key not in shapes or key not in found or shapes[key][0] != found[key][0]
        ]
        if differing:
            raise ArtefactError(
                f"{first} and {other} differ in {', '.join(differing[:3])}",
                expected="models tuned from the same one",
            )
    known = [{stored.key: stored for stored in iter_stored(other)} for other in others]

    def change(stored: Stored) -> Rows | None:
        if not others:
            return None
        return lambda: _mean_rows([stored, *(each[stored.key] for each in known)])

    return change


def _read_shapes(model: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and types of what stock code reads; see `_read_by_stock_code`."""
    config = read_config(model)
    family = family_for(config)
    return {
        key: found
        for key, found in tensor_shapes(model).items()
        if not family.is_surplus(config, key)
    }


def _mean_rows(tensors: Sequence[Stored]) -> "Iterator[torch.Tensor]":
    """A thousand rows at a time, whatever types they are stored in."""
    import torch

    pieces = [
        each.rows(_ROWS * each.size_bytes // each.shape[0] if each.shape else 1) for each in tensors
    ]
    for parts in zip(*pieces, strict=True):
        yield torch.stack([rows.float() for _, rows in parts]).mean(0)


def _read_by_stock_code(source: Path, config: Mapping[str, Any]) -> Iterator[Stored]:
    """The tensors without those that stock code ignores (the second copy of a tied head).

    Raises:
        ArtefactError: the second copy is none.
    """
    family = family_for(config)
    check_tied_head(source, family, config)
    return (stored for stored in iter_stored(source) if not family.is_surplus(config, stored.key))


def _plain_config(source: Path) -> dict[str, Any]:
    config = read_config(source)
    if config.get("quantization_config") is not None:
        raise ArtefactError(
            f"{source} is stored quantised: what was rounded off is lost",
            expected="a model in bfloat16, float16 or float32",
            mend="name the model that it was made from",
        )
    return config


def _part(stored: Stored, kind: str, changed: Rows | None) -> Part:
    """A tensor in type `kind`, its values changed; as it is where neither asks for anything."""
    import torch

    if stored.kind not in _FLOATS or (stored.kind == kind and changed is None):
        return unchanged(stored)
    dtype = getattr(torch, TORCH_TYPES[kind])

    def pieces() -> Iterator[memoryview]:
        for rows in changed() if changed is not None else (rows for _, rows in stored.rows()):
            cast = rows.to(dtype)
            _check_finite(stored, rows, cast, changed is not None)
            yield raw(cast)

    size = math.prod(stored.shape) * element_bytes(kind)
    return Part(stored.key, kind, stored.shape, size, pieces)


def _check_finite(stored: Stored, rows: "torch.Tensor", cast: "torch.Tensor", merged: bool) -> None:
    """Refuses values that are no numbers, or are too large for the type that they are stored in.

    An infinity that stands in the model itself is a bound that means it (Gemma 4's clipping), unless it was merged.
    """
    wrong = ~cast.isfinite()
    if not bool(wrong.any()):
        return
    dtype = str(cast.dtype).removeprefix("torch.")
    if bool((wrong & rows.isfinite()).any()):
        raise ArtefactError(
            f"{stored.key} holds {float(rows[rows.isfinite()].abs().max()):.3g}, which is infinite in {dtype}",
            expected="weights that the type can hold",
            mend="store it in bfloat16 or float32",
        )
    if not merged and not bool(cast.isnan().any()):
        return
    raise ArtefactError(
        f"{stored.key} of {stored.file.parent} holds values that are no numbers, or would after the merge",
        expected="finite weights in the model and in the adapter",
        mend="copy or make the model again, or tune it again with a lower learning rate",
    )


def write_nf4(source: Path, target: Path, max_shard_bytes: int) -> None:
    """Copies a model directory with the decoder's linear layers in NF4, the rest in bfloat16.

    Raises:
        ArtefactError: weights missing, damaged, or stored in 4 bits already.
        FamilyError: a layer's input features are no multiple of 64.
    """
    config = _plain_config(source)
    family = family_for(config)
    family.check_stored(source, tensor_shapes(source))
    parts: list[Part] = []
    for stored in _read_by_stock_code(source, config):
        if nf4.is_quantised(family, stored):
            parts += nf4.parts_of(stored)
        else:
            parts.append(_part(stored, "BF16", None))
    write_shards(target, parts, max_shard_bytes)
    copy_side_files(source, target)
    new = with_dtype(config, "bfloat16")
    new["quantization_config"] = _quantization_facts(family)
    write_config(target, new)


def _quantization_facts(family: Family) -> dict[str, Any]:
    facts: dict[str, Any] = quantization_config(family, "nf4").to_dict()
    return facts
