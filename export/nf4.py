"""NF4 with double quantisation, tensor by tensor, in the files that stock transformers loads.

Source: Dettmers et al. 2023, QLoRA. bitsandbytes does the arithmetic.
"""

from typing import TYPE_CHECKING, Any

from halve.errors import FamilyError, MissingExtraError
from halve.families import Family

if TYPE_CHECKING:
    import torch

BLOCK_SIZE = 64


def is_quantised(family: Family, key: str, tensor: "torch.Tensor") -> bool:
    """Whether a tensor on disk is the weight of a linear layer in the decoder's layers.

    Embeddings, head, audio tower and projector stay as they are, as in QLoRA training.
    """
    return key.startswith(family.disk_layers) and key.endswith(".weight") and tensor.dim() == 2


def _quantise(key: str, weight: "torch.Tensor") -> tuple["torch.Tensor", Any]:
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise MissingExtraError("bitsandbytes", "train") from None
    if weight.shape[1] % BLOCK_SIZE:
        raise FamilyError(
            f"{key} has {weight.shape[1]} input features",
            expected=f"a multiple of {BLOCK_SIZE}, which 4-bit kernels need",
            mend="choose precision bf16, or an ONNX package in int4",
        )
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def stored_tensors(key: str, weight: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """The tensors that a 4-bit checkpoint holds for one weight, by their keys.

    Raises:
        FamilyError: the weight's rows are not of a length that 4-bit kernels take.
        MissingExtraError: bitsandbytes is not installed.
    """
    packed, state = _quantise(key, weight)
    parts = state.as_dict(packed=True)
    return {key: packed, **{f"{key}.{name}": value for name, value in parts.items()}}


def rounded(key: str, weight: "torch.Tensor") -> "torch.Tensor":
    """The weight as a 4-bit layer uses it: quantised and dequantised, in its own type."""
    from bitsandbytes.functional import dequantize_4bit

    packed, state = _quantise(key, weight)
    restored: torch.Tensor = dequantize_4bit(packed, state).to(weight.dtype)
    return restored.reshape(weight.shape)
