"""Masks of who sees whom, as a stock decoder takes them ready made."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ALL_WINDOWED = frozenset({"mistral"})
"""Decoder model types whose layers all attend to the config's window, whatever kinds of layers it lists."""
ADDING = "eager"
"""The stock attention that adds a mask to the scores: True would add 1 there, and hide nothing."""


def layer_masks(
    config: Any, mask: "torch.Tensor", positions: "torch.Tensor", dtype: "torch.dtype"
) -> "torch.Tensor | dict[str, torch.Tensor]":
    """A mask for all layers of a decoder, or one for each kind of layer that it has.

    Args:
        config: the decoder's, as loaded.
        mask: (rows, 1, tokens, tokens), bool, True where a token may look.
        positions: (rows, tokens).
        dtype: of the layers' states.

    Returns:
        each shaped as `mask`: bool, or of `dtype` where the decoder's attention adds it.
    """
    full = _as_taken(config, mask, dtype)
    window = getattr(config, "sliding_window", None)
    alike = config.model_type in ALL_WINDOWED
    kinds = set(getattr(config, "layer_types", None) or ())
    if window is None or not (alike or "sliding_attention" in kinds):
        return full
    distance = positions[:, None, :, None] - positions[:, None, None, :]
    windowed = _as_taken(config, mask & (distance < window), dtype)
    return windowed if alike else {"full_attention": full, "sliding_attention": windowed}


def _as_taken(config: Any, mask: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    if config._attn_implementation != ADDING:
        return mask
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
