"""Decoder rows without padding: attention over packed or decoding rows, run through stock layers.

Stock decoder layers look their attention function up by name at every call and hand it whatever extra
arguments they were given. This module registers one such function, `halve_packed`, whose extra argument
says which tokens are whose. The layers themselves stay the stock ones, keep the teacher's numbers, and
know nothing of it; norms and linear parts see one flat list of tokens, none of them padding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from halve.errors import FamilyError

IMPLEMENTATION = "halve_packed"


@dataclass(frozen=True)
class Tail:
    """The last tokens of each packed row: those whose output is looked at."""

    tokens: Tensor
    """Their indices among all tokens, ascending: shape (tail tokens,)."""
    counts: list[int]
    """How many belong to each row, at least one."""


class RowAttention(Protocol):
    """Knows which of the tokens in flight belong together, and what each may look back to."""

    softcap: float | None
    """Where scores level off (Gemma 2); None where they do not."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        tail: Tail | None = None,
    ) -> Tensor:
        """Attention output (queries, heads, dim) of query (heads, queries, dim), key and value alike.

        There is one query a token, or one a token of `tail`.
        """


class PackedRows:
    """Whole rows one after the other, each attending to itself causally; their keys and values are kept.

    `keys[layer]` and `values[layer]` have shape (tokens, key-value heads, dim).
    """

    softcap: float | None = None

    def __init__(self, lengths: Sequence[int]) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths = list(lengths)
        self.starts = [0, *accumulate(lengths)]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        tail: Tail | None = None,
    ) -> Tensor:
        """See RowAttention."""
        self.keys[layer], self.values[layer] = key.transpose(0, 1), value.transpose(0, 1)
        counts = self.lengths if tail is None else tail.counts
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        first = 0
        for start, length, count in zip(self.starts, self.lengths, counts, strict=False):
            mask = _band(count, length, window, query.device)
            output[first : first + count] = _attention(
                query[None, :, first : first + count],
                key[None, :, start : start + length],
                value[None, :, start : start + length],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[0] != key.shape[0],
                softcap=self.softcap,
            )[0].transpose(0, 1)
            first += count
        return output


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *, softcap: float | None, **options: Any
) -> Tensor:
    """Scaled dot product attention, its scores levelled off at `softcap` where there is one."""
    if softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, **options)
    groups = query.shape[1] // key.shape[1] if options.get("enable_gqa") else 1
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * options["scale"] / softcap) * softcap
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _band(count: int, length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys the last `count` tokens of a row see; None where the plain causal mask says it."""
    if count == length and (window is None or length <= window):
        return None
    place = torch.arange(length, device=device)
    distance = place[length - count :, None] - place[None, :]
    return (distance >= 0) & (distance < (window or length))


class DecodingRows:
    """Rows that grow by one token a step, each in a slot of its own.

    Keys and values have shape (slots, capacity, key-value heads, dim) for each layer. The buffers
    outlive the rows: what a finished row left behind is masked, then overwritten.
    """

    softcap: float | None = None

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
        self,
        first_slot: int,
        source: PackedRows,
        layers: Sequence[int],
        spans: Sequence[tuple[int, int]],
    ) -> None:
        """Copies packed rows, each from its first token to before a last one, to slots from `first_slot` on."""
        for layer in layers:
            for buffer, packed in zip(
                self._buffer(layer), (source.keys[layer], source.values[layer]), strict=True
            ):
                for slot, (start, stop) in enumerate(spans, first_slot):
                    buffer[slot, : stop - start] = packed[start:stop]

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
        tail: Tail | None = None,
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
        output = _attention(
            query.transpose(0, 1).reshape(rows, kv_heads, -1, dim),
            keys[:rows, : self._longest].transpose(1, 2),
            values[:rows, : self._longest].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
            softcap=self.softcap,
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
    if options.get("s_aux") is not None:
        raise FamilyError(
            "The importance search does not know this model's attention (sinks)",
            mend="use --method reference",
        )
    halve_rows.softcap = options.get("softcap")
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
