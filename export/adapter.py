"""Reads a LoRA adapter and computes what it adds to each weight of its base model."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.errors import ArtefactError
from halve.families import Family
from halve.shards import Stored, read_header

if TYPE_CHECKING:
    import torch

    Rows = Iterator[torch.Tensor]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_REFUSED = (
    "use_dora", "fan_in_fan_out", "lora_bias", "modules_to_save", "alpha_pattern", "rank_pattern",
    "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens",
)  # fmt: skip
_PLAIN_STARTS = (None, True, False, "gaussian", "eva")
"""Ways to begin an adapter that leave the base's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them."""


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, not a whole model."""
    return (path / CONFIG).is_file()


@dataclass
class Adapter:
    """A LoRA adapter, or the mean of several: pairs of low-rank factors, left on disk, by the key of the weight they change."""

    factors: dict[str, list[tuple[Stored, Stored, float]]]
    """Down, up, and what their product is multiplied by."""

    def added(self, key: str, pieces: "Iterable[tuple[int, torch.Tensor]]") -> "Rows":
        """Rows of weight + scaling * B @ A, summed over the factors, in float32; the rows themselves where it changes nothing.

        Args:
            pieces: the number of the first row, and rows (some, in) of the weight (out, in).
        """
        import torch

        if key not in self.factors:
            yield from (rows for _, rows in pieces)
            return
        factors = [
            (down.tensor().float(), up.tensor().float(), scaling)
            for down, up, scaling in self.factors[key]
        ]
        for first, rows in pieces:
            total = rows.float()
            for down, up, scaling in factors:
                total = torch.addmm(total, up[first : first + len(rows)], down, alpha=scaling)
            yield total


def mean_of(adapters: Sequence[Adapter]) -> Adapter:
    """What merging each of several adapters alone, and averaging the weights, would give (Wortsman et al. 2022, arXiv 2203.05482)."""
    factors: dict[str, list[tuple[Stored, Stored, float]]] = {}
    for adapter in adapters:
        for key, found in adapter.factors.items():
            shares = [(down, up, scaling / len(adapters)) for down, up, scaling in found]
            factors.setdefault(key, []).extend(shares)
    return Adapter(factors)


def read_adapter(
    path: Path, family: Family, shapes: dict[str, tuple[tuple[int, ...], str]]
) -> Adapter:
    """Reads a peft directory.

    Args:
        shapes: shape and type of each tensor of the base model, by its key on disk.

    Raises:
        ArtefactError: damaged, of a kind that cannot be merged so, or made for another model.
    """
    config = _read_config(path)
    if not (path / WEIGHTS).is_file():
        raise ArtefactError(f"{path / WEIGHTS} is missing", mend="tune again, or copy it again")
    tensors = read_header(path / WEIGHTS)
    pairs: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        module, separator, which = name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        if not separator or which not in ("A.weight", "B.weight"):
            raise ArtefactError(f"{path}: {name} is no LoRA factor of a linear layer")
        pairs.setdefault(disk_key(family, f"{module}.weight"), {})[which[0]] = tensor
    factors = {key: (pair["A"], pair["B"]) for key, pair in pairs.items() if len(pair) == 2}
    _check(path, factors, pairs, shapes)
    scaling = _scaling(path / CONFIG, config)
    return Adapter({key: [(down, up, scaling)] for key, (down, up) in factors.items()})


def _scaling(file: Path, config: dict[str, Any]) -> float:
    """What the product of the factors is multiplied by.

    Raises:
        ArtefactError: no rank, or no scale.
    """
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ArtefactError(
            f"{file} has r {rank!r} and lora_alpha {alpha!r}",
            expected="a rank of at least 1 and a number",
            mend="copy the adapter's own file again, or tune again",
        )
    # Rank-stabilised LoRA (Kalajdzievski 2023) divides by the root of the rank.
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path / CONFIG} is missing or damaged ({error})") from None
    if not isinstance(config, dict):
        raise ArtefactError(
            f"{path / CONFIG} holds no settings",
            expected="an object",
            mend="tune again, or copy it again",
        )
    refused = [name for name in _REFUSED if config.get(name)]
    if (start := config.get("init_lora_weights")) not in _PLAIN_STARTS:
        refused.append(f"init_lora_weights {start!r}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or refused:
        raise ArtefactError(
            f"{path} is an adapter of type {config.get('peft_type')} with {', '.join(refused) or 'biases'}",
            expected="plain LoRA or rank-stabilised LoRA on linear layers",
            mend="merge it with peft's merge_and_unload, and go on from the merged model",
        )
    return config


def _check(
    path: Path,
    factors: dict[str, tuple[Stored, Stored]],
    pairs: dict[str, Any],
    shapes: dict[str, tuple[tuple[int, ...], str]],
) -> None:
    faults = [f"{key} has only one factor" for key in pairs if key not in factors]
    for key, (down, up) in factors.items():
        expected = (up.shape[0], down.shape[1])
        if key not in shapes:
            faults.append(f"the model has no {key}")
        elif shapes[key][0] != expected:
            faults.append(f"{key} is {shapes[key][0]} in the model, {expected} in the adapter")
    if faults or not factors:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ArtefactError(
            f"{path} does not fit the model: {'; '.join(faults[:3]) or 'it is empty'}{more}",
            expected="the adapter that was tuned on this very model",
            mend="name the pruned model that `halve tune` started from",
        )


def disk_key(family: Family, key: str) -> str:
    """The key on disk of a parameter given by its path in memory."""
    table = (
        (f"{family.layers}.", family.disk_layers),
        (f"{family.embeddings}.", family.disk_embeddings),
        (f"{family.head}.", family.disk_head),
        (f"{family.audio_tower}.", family.disk_audio_tower),
        (f"{family.projector}.", family.disk_projector),
    )
    for memory, disk in table:
        if key.startswith(memory):
            return disk + key.removeprefix(memory)
    return key
