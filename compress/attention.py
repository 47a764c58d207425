"""Attention of training batches on a CPU, where masked rows are short: plain products beat the fused kernel.

With a mask, torch's fused attention takes three times as long backward as forward. The rows of a training batch
that share their audio always have one. Written out, forward and backward of the demo's teacher take a sixth less
time (docs/lab-notebook.md). Everything else, other devices and rows without a mask, goes the stock way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from halve.families import resolve
from halve.models import SpeechModel

IMPLEMENTATION = "halve_training"
STOCK = "sdpa"


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention output (rows, queries, heads, dim).

    Args:
        query: (rows, heads, queries, dim).
        key: (rows, key-value heads, keys, dim); a key head serves several heads in a row.
        value: as `key`.
        mask: (rows, 1, queries, keys), bool, True where a query may look; every query looks somewhere.
    """
    rows, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = (query * scale).reshape(rows, kv_heads, -1, dim)
    scores = (grouped @ key.transpose(2, 3)).view(rows, kv_heads, -1, queries, keys)
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    output = weights.view(rows, kv_heads, -1, keys) @ value
    return output.view(rows, heads, queries, dim).transpose(1, 2)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """What stock attention calls; shapes as in `masked_attention`."""
    plain = attention_mask is not None and attention_mask.dtype == torch.bool and not dropout
    if plain and not any(options.get(name) is not None for name in ("softcap", "s_aux")):
        assert attention_mask is not None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return masked_attention(query, key, value, attention_mask, scale).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return attended


@contextmanager
def training_attention(speech: SpeechModel) -> Iterator[None]:
    """While open, a decoder on a CPU that attends the stock way attends as this module says."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = resolve(speech.model, speech.family.decoder).config
    if torch.device(speech.device).type != "cpu" or config._attn_implementation != STOCK:
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = STOCK
