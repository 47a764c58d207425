"""NF4 with double quantisation, tensor by tensor, in the files that stock transformers loads.

Source: Dettmers et al. 2023, QLoRA. The codes are those of bitsandbytes, bit for bit; its own
function for the CPU makes temporaries of many times the weight's size and is several times slower.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from halve.audio import FloatArray
from halve.errors import FamilyError
from halve.families import Family
from halve.models import need_bitsandbytes
from halve.shard_writer import Part, raw
from halve.shards import Stored

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 64
"""Weights that share a scale."""
SCALE_BLOCK_SIZE = 256
"""Scales that share a scale of their own."""
STATE_BYTES = 256
"""The state is JSON whose length depends on a number; blanks make it a length known beforehand."""

_CHUNK = 1 << 18
"""Weights coded at once: few enough for temporaries that stay in the processor's cache."""
Codes = NDArray[np.uint8]

_STATE = "quant_state.bitsandbytes__nf4"
_CODES = 16


def is_quantised(family: Family, stored: Stored) -> bool:
    """Whether a tensor on disk is the weight of a linear layer in the decoder's layers.

    Embeddings, head, audio tower, projector and norms stay as they are, as in QLoRA training. A norm's
    weight can have two dimensions: one row for each head of queries or keys.
    """
    key = stored.key
    linear = key.endswith(".weight") and not key.endswith("norm.weight") and len(stored.shape) == 2
    return linear and key.startswith(family.disk_layers)


def parts_of(stored: Stored) -> list[Part]:
    """The tensors that a 4-bit checkpoint holds for one weight, taken as bfloat16.

    The weight is read once, in pieces; its scales wait in memory until it is written.

    Raises:
        FamilyError: the weight's rows are not of a length that 4-bit kernels take.
        MissingExtraError: bitsandbytes is not installed.
    """
    _check(stored)
    numbers = math.prod(stored.shape)
    scales = numbers // BLOCK_SIZE
    coded = _Coded(stored)
    sizes = {
        "absmax": ("U8", scales),
        "quant_map": ("F32", _CODES),
        "nested_absmax": ("F32", -(-scales // SCALE_BLOCK_SIZE)),
        "nested_quant_map": ("F32", 256),
        _STATE: ("U8", STATE_BYTES),
    }
    packed = Part(stored.key, "U8", (numbers // 2, 1), numbers // 2, coded.packed)
    return [packed, *(coded.part(name, *size) for name, size in sizes.items())]


class _Coded:
    """One weight's codes, and what decodes them."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._facts: dict[str, torch.Tensor] = {}

    def packed(self) -> Iterator[memoryview]:
        """The codes, two a byte, as they are made; afterwards the rest is known."""
        import torch

        scales = []
        for _, rows in self._stored.rows():
            packed, absmax = _codes(rows.to(torch.bfloat16))
            scales.append(absmax)
            yield raw(packed)
        state = _state(torch.cat(scales), self._stored.shape, torch.bfloat16)
        self._facts = state.as_dict(packed=True)

    def part(self, name: str, kind: str, count: int) -> Part:
        """One of the tensors beside the codes."""

        def pieces() -> Iterator[memoryview]:
            yield raw(_padded(self._facts.pop(name)) if name == _STATE else self._facts.pop(name))

        size = count * (4 if kind == "F32" else 1)
        return Part(f"{self._stored.key}.{name}", kind, (count,), size, pieces)


def _padded(state: "torch.Tensor") -> "torch.Tensor":
    import torch

    padded = torch.full((STATE_BYTES,), ord(" "), dtype=torch.uint8)
    padded[: len(state)] = state
    return padded


def _check(stored: Stored) -> None:
    need_bitsandbytes()
    if stored.shape[1] % BLOCK_SIZE:
        raise FamilyError(
            f"{stored.key} has {stored.shape[1]} input features",
            expected=f"a multiple of {BLOCK_SIZE}, which 4-bit kernels need",
            mend="choose precision bf16, or an ONNX package in int4",
        )


def _codes(weight: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Packed codes (numbers / 2,) uint8 and each block's largest magnitude (blocks,) float32.

    A code is the number of midpoints between levels that a weight exceeds: fifteen vectorised
    comparisons, which numpy does many times faster than a search of each weight's place.
    """
    import torch
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device="cpu")
    bounds = ((levels[:-1] + levels[1:]) / 2).numpy()
    flat = weight.reshape(-1)
    packed = torch.empty(len(flat) // 2, dtype=torch.uint8)
    absmax = torch.empty(len(flat) // BLOCK_SIZE, dtype=torch.float32)
    for start in range(0, len(flat), _CHUNK):
        blocks = flat[start : start + _CHUNK].float().reshape(-1, BLOCK_SIZE)
        largest = blocks.abs().amax(dim=1)
        absmax[start // BLOCK_SIZE :][: len(largest)] = largest
        scaled = blocks * (1.0 / largest.clamp(min=1e-38))[:, None]
        codes = _exceeded(scaled.reshape(-1).numpy(), bounds).view(np.int16)
        # Two codes lie in one number, the first in its low byte; it goes to the high half of the packed byte.
        packed[start // 2 :][: len(codes)] = torch.from_numpy(((codes << 4) | (codes >> 8)) & 0xFF)
    return packed, absmax


def _exceeded(values: FloatArray, bounds: FloatArray) -> Codes:
    """How many of the bounds each value is greater than."""
    above = np.empty(len(values), dtype=np.bool_)
    codes = np.zeros(len(values), dtype=np.uint8)
    for bound in bounds:
        np.greater(values, bound, out=above)
        codes += above.view(np.uint8)
    return codes


def _state(absmax: "torch.Tensor", shape: tuple[int, ...], dtype: "torch.dtype") -> Any:
    """What bitsandbytes decodes with: the scales, themselves quantised to 8 bits about their mean."""
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    offset = absmax.mean()
    scales, nested = quantize_blockwise(absmax - offset, blocksize=SCALE_BLOCK_SIZE)
    return QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        dtype=dtype,
        blocksize=BLOCK_SIZE,
        code=get_4bit_type("nf4", device="cpu"),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )


def rounded(stored: Stored, arithmetic: str) -> "torch.Tensor":
    """A weight as a 4-bit layer computes with it: quantised and dequantised, in float32.

    Args:
        arithmetic: float32 or bfloat16, which the layer is loaded and computes in: what it quantises is the
            weight cast to that.

    Raises:
        FamilyError: the weight's rows are not of a length that 4-bit kernels take.
        MissingExtraError: bitsandbytes is not installed.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    _check(stored)
    dtype = getattr(torch, arithmetic)
    packed, absmax = _codes(stored.tensor().to(dtype))
    state = _state(absmax, stored.shape, dtype)
    restored: torch.Tensor = dequantize_4bit(packed.unsqueeze(1), state)
    return restored.reshape(stored.shape).float()
