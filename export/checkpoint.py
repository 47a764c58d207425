"""Checkpoints for stock transformers, written shard by shard."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import nf4
from halve.families import Family, family_for
from halve.models import quantization_config, read_config
from halve.shards import ShardWriter, copy_shards, copy_side_files, iter_tensors, write_config

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Transform = Callable[[str, "torch.Tensor"], "torch.Tensor"]


def cast(tensor: "torch.Tensor", dtype: str) -> "torch.Tensor":
    """A floating-point tensor in another type; any other as it is."""
    import torch

    return tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor


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
    transform: Transform | None = None,
) -> None:
    """Copies a model directory with its weights in another type.

    Args:
        transform: changes a tensor, given by its key on disk, before it is cast.
    """

    def changed(key: str, tensor: "torch.Tensor") -> "torch.Tensor":
        return cast(tensor if transform is None else transform(key, tensor), dtype)

    copy_shards(source, target, lambda key: key, changed, max_shard_bytes)
    copy_side_files(source, target)
    write_config(target, with_dtype(read_config(source), dtype))


def write_nf4(source: Path, target: Path, max_shard_bytes: int) -> None:
    """Copies a model directory with the decoder's linear layers in NF4, the rest in bfloat16.

    Raises:
        FamilyError: a layer's input features are no multiple of 64.
    """
    config = read_config(source)
    family = family_for(config)
    writer = ShardWriter(target, max_shard_bytes)
    for key, stored in iter_tensors(source):
        tensor = cast(stored, "bfloat16")
        if nf4.is_quantised(family, key, tensor):
            for name, part in nf4.stored_tensors(key, tensor).items():
                writer.add(name, part)
        else:
            writer.add(key, tensor)
    writer.close()
    copy_side_files(source, target)
    new = with_dtype(config, "bfloat16")
    new["quantization_config"] = _quantization_facts(family)
    write_config(target, new)


def _quantization_facts(family: Family) -> dict[str, Any]:
    facts: dict[str, Any] = quantization_config(family, "nf4").to_dict()
    return facts
