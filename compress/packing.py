"""Decoder rows without padding: attention over packed or decoding rows, run through stock layers.

Stock decoder layers look their attention function up by name at every call and hand it whatever extra
arguments they were given. This module registers one such function, `halve_packed`, whose extra argument
says which tokens are whose. The layers themselves stay the stock ones, keep the teacher's numbers, and
know nothing of it; norms and linear parts see one flat list of tokens, none of them padding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from halve.errors import FamilyError

IMPLEMENTATION = "halve_packed"


class RowAttention(Protocol):
    """Knows which of the tokens in flight belong together, and what each may look back to."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention output (tokens, heads, dim) of query (heads, tokens, dim), key and value alike."""


class PackedRows:
    """Whole rows one after the other, each attending to itself causally; their keys and values are kept.

    `keys[layer]` and `values[layer]` have shape (tokens, key-value heads, dim).
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.starts = [0]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See RowAttention."""
        self.keys[layer], self.values[layer] = key.transpose(0, 1), value.transpose(0, 1)
        grouped = query.shape[0] != key.shape[0]
        outputs = []
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            mask = _band(end - start, window, query.device)
            output = functional.scaled_dot_product_attention(
                query[None, :, start:end],
                key[None, :, start:end],
                value[None, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=grouped,
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask of a sliding window, where the row is longer than the window."""
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


class DecodingRows:
    """Rows that grow by one token a step, each in a slot of its own.

    Keys and values have shape (slots, capacity, key-value heads, dim) for each layer. The buffers
    outlive the rows: what a finished row left behind is masked, then overwritten.
    """

    def __init__(
        self, slots: int, capacity: int, kv_heads: int, dim: int, dtype: torch.dtype, device: Any
    ) -> None:
        self._shape = (slots, capacity, kv_heads, dim)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions = torch.empty(0, dtype=torch.long, device=device)
        self._slots = self._positions
        self._mask: Tensor | None = None
        self._longest = 0

    def _buffer(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._buffers:
            # Zeros, not empty: a masked NaN would still spoil the weighted sum.
            self._buffers[layer] = (
                torch.zeros(self._shape, **self._options),
                torch.zeros(self._shape, **self._options),
            )
        return self._buffers[layer]

    def fill(
        self, first_slot: int, source: PackedRows, layers: Sequence[int], rows: Tensor
    ) -> None:
        """Copies packed rows into the slots from `first_slot` on.

        Args:
            rows: token indices into the source, shape (rows, longest); shorter rows repeat any token,
                which the mask hides.
        """
        stop, longest = first_slot + rows.shape[0], rows.shape[1]
        for layer in layers:
            keys, values = self._buffer(layer)
            keys[first_slot:stop, :longest] = source.keys[layer][rows]
            values[first_slot:stop, :longest] = source.values[layer][rows]

    def keep(self, slots: Tensor) -> None:
        """Moves the given slots to the front, in order."""
        for keys, values in self._buffers.values():
            keys[: len(slots)] = keys[slots]
            values[: len(slots)] = values[slots]

    def begin_step(self, positions: Tensor) -> None:
        """Says where each slot's next token stands: shape (slots,)."""
        self._positions = positions
        self._slots = torch.arange(len(positions), device=positions.device)
        self._longest = int(positions.max()) + 1
        places = torch.arange(self._longest, device=positions.device)
        self._mask = (places[None, :] <= positions[:, None])[:, None, None, :]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """See RowAttention; there is one token a slot."""
        keys, values = self._buffer(layer)
        keys[self._slots, self._positions] = key.transpose(0, 1)
        values[self._slots, self._positions] = value.transpose(0, 1)
        rows, kv_heads, dim = len(self._slots), key.shape[0], query.shape[-1]
        mask = self._mask
        if window is not None and self._longest > window:
            places = torch.arange(self._longest, device=query.device)
            near = places[None, :] > self._positions[:, None] - window
            mask = mask & near[:, None, None, :] if mask is not None else None
        # Heads that share a key head take the place of query positions: nothing is repeated.
        output = functional.scaled_dot_product_attention(
            query.transpose(0, 1).reshape(rows, kv_heads, -1, dim),
            keys[:rows, : self._longest].transpose(1, 2),
            values[:rows, : self._longest].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
        )
        return output.reshape(rows, -1, dim)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    halve_rows: RowAttention,
    **options: Any,
) -> tuple[Tensor, None]:
    """The function stock attention calls; shapes (1, heads, tokens, dim), output (1, tokens, heads, dim)."""
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise FamilyError(
            "The importance search does not know this model's attention (soft cap or sinks)",
            mend="use --method reference",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.get("sliding_window")
    return halve_rows.attend(module.layer_idx, query[0], key[0], value[0], scale, window)[
        None
    ], None


@contextmanager
def packed_attention(config: Any) -> Iterator[None]:
    """While open, layers of this text config attend through `halve_rows`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _packed_attention)
    before = config._attn_implementation
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
