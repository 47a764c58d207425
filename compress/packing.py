"""Decoder rows without padding: attention over packed or decoding rows, run through stock layers.

Stock decoder layers look their attention function up by name at every call and hand it whatever extra
arguments they were given. This module registers one such function, `halve_packed`, whose extra argument
says which tokens are whose. The layers themselves stay the stock ones, keep the teacher's numbers, and
know nothing of it; norms and linear parts see one flat list of tokens, none of them padding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
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
    shared: dict[str, Any]
    """What a layer leaves of these tokens for later layers, as stock code hands it on."""

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

    What all rows begin with, the stem, stands once before them, and each row attends to it too.
    `keys[layer]` and `values[layer]` have shape (key-value heads, tokens, dim).
    """

    softcap: float | None = None

    def __init__(self, lengths: Sequence[int], stem: int = 0) -> None:
        """`lengths` are those of the rows without the stem."""
        self.shared: dict[str, Any] = {}
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths = list(lengths)
        self.stem = stem
        self.starts = list(accumulate(lengths, initial=stem))
        self._bands: dict[int | None, Tensor] = {}

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
        self.keys[layer], self.values[layer] = key, value
        stem = self.stem
        if window not in self._bands:
            self._bands[window] = _band(stem + max(self.lengths), window, query)
        band = self._bands[window]
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        pieces = list(
            zip(
                self.starts,
                self.lengths,
                self.lengths if tail is None else tail.counts,
                strict=False,
            )
        )
        first = 0
        if stem and tail is None:
            pieces.insert(0, (stem, 0, stem))
        for start, length, count in pieces:
            seen = stem + length
            output[first : first + count] = _attention(
                query[None, :, first : first + count],
                _with_stem(key, stem, start, length)[None],
                _with_stem(value, stem, start, length)[None],
                attn_mask=band[seen - count : seen, :seen],
                scale=scale,
                enable_gqa=query.shape[0] != key.shape[0],
                softcap=self.softcap,
            )[0].transpose(0, 1)
            first += count
        return output


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor,
    scale: float,
    enable_gqa: bool = False,
    softcap: float | None,
) -> Tensor:
    """Scaled dot product attention, its scores levelled off at `softcap` where there is one."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap + attn_mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _with_stem(states: Tensor, stem: int, start: int, length: int) -> Tensor:
    """The keys or values (heads, tokens, dim) of one row and the stem before it."""
    if not stem:
        return states[:, start : start + length]
    return torch.cat([states[:, :stem], states[:, start : start + length]], dim=1)


def _band(length: int, window: int | None, like: Tensor) -> Tensor:
    """What is added to scores (length, length) so that a token sees itself and what is before it.

    A row's last tokens and a shorter row find theirs in the upper left and lower parts of it.
    """
    place = torch.arange(length, device=like.device)
    distance = place[:, None] - place[None, :]
    hidden = (distance < 0) | (distance >= (window or length))
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, float("-inf")
    )


class SlotBin:
    """Slots for rows of like length that grow by one token a step.

    Keys and values have shape (slots, key-value heads, capacity, dim) for each layer: what a head looks
    back to lies together. The buffers outlive the rows: what a finished row left behind is masked, then
    overwritten.
    """

    softcap: float | None = None

    def __init__(self, slots: int, capacity: int, dtype: torch.dtype, device: Any) -> None:
        self._shape = (slots, capacity)
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions = torch.empty(0, dtype=torch.long, device=device)
        self._slots = self._positions
        self._mask = torch.empty(0)
        self._longest = 0

    def _buffer(self, layer: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A layer's buffers, made when its first keys and values (key-value heads, tokens, dim) come.

        They begin as zeros: a masked NaN would still spoil a weighted sum.
        """
        if layer not in self._buffers:
            slots, capacity = self._shape
            keys, values = (
                _zeros((slots, states.shape[0], capacity, states.shape[2]), states)
                for states in like
            )
            self._buffers[layer] = keys, values
        return self._buffers[layer]

    def prepare(self, source: PackedRows, layers: Sequence[int]) -> None:
        """Makes the buffers that `fill` writes to, which may then be called from several threads."""
        for layer in layers:
            self._buffer(layer, (source.keys[layer], source.values[layer]))

    def fill(
        self, slot: int, source: PackedRows, layers: Sequence[int], row: int, length: int
    ) -> None:
        """Copies the first `length` tokens of a packed row, its stem among them, into a slot."""
        stem, start = source.stem, source.starts[row]
        stop = start + length - stem
        for layer in layers:
            packed = source.keys[layer], source.values[layer]
            for buffer, states in zip(self._buffer(layer, packed), packed, strict=True):
                buffer[slot, :, :stem] = states[:, :stem]
                buffer[slot, :, stem:length] = states[:, start:stop]

    def keep(self, going: Sequence[bool]) -> list[int]:
        """Moves the last of the rows that go on into the slots of those that do not.

        Returns:
            for each slot up to the number of rows that go on, the slot that its row was in.
        """
        count = sum(going)
        order = list(range(count))
        holes = [slot for slot in order if not going[slot]]
        movers = [slot for slot in range(count, len(going)) if going[slot]]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
            for keys, values in self._buffers.values():
                for buffer in (keys, values):
                    buffer[hole, :, : self._longest] = buffer[mover, :, : self._longest]
        return order

    def begin_step(self, positions: Tensor) -> None:
        """Says where the next token of each slot in use stands: shape (slots in use,)."""
        self._positions = positions
        self._slots = torch.arange(len(positions), device=positions.device)
        self._longest = int(positions.max()) + 1
        places = torch.arange(self._longest, device=positions.device)
        hidden = (places[None, :] > positions[:, None])[:, None, None, :]
        self._mask = torch.zeros(hidden.shape, **self._options)
        self._mask.masked_fill_(hidden, float("-inf"))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """As RowAttention's, with one token a slot in use."""
        keys, values = self._buffer(layer, (key, value))
        keys[self._slots, :, self._positions] = key.transpose(0, 1)
        values[self._slots, :, self._positions] = value.transpose(0, 1)
        rows, kv_heads, dim = len(self._slots), key.shape[0], query.shape[-1]
        mask = self._mask
        if window is not None and self._longest > window:
            places = torch.arange(self._longest, device=query.device)
            far = places[None, :] <= self._positions[:, None] - window
            mask = mask.masked_fill(far[:, None, None, :], float("-inf"))
        # Heads that share a key head take the place of query positions: nothing is repeated.
        output = _attention(
            query.transpose(0, 1).reshape(rows, kv_heads, -1, dim),
            keys[:rows, :, : self._longest],
            values[:rows, :, : self._longest],
            attn_mask=mask,
            scale=scale,
            softcap=self.softcap,
        )
        return output.reshape(rows, -1, dim)


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros; on a CPU numpy's, which cost memory and time only where they are written to."""
    if like.device.type != "cpu":
        return torch.zeros(*shape, dtype=like.dtype, device=like.device)
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(*shape)


class DecodingRows:
    """Rows that grow by one token a step, in bins: a short row is not attended to as a long one.

    Slots are numbered through the bins, those in use only.
    """

    softcap: float | None = None

    def __init__(self, bins: Sequence[SlotBin]) -> None:
        self.shared: dict[str, Any] = {}
        self.bins = list(bins)
        self._counts = [0] * len(self.bins)

    def use(self, counts: Sequence[int]) -> None:
        """Says how many slots of each bin are in use."""
        self._counts = list(counts)

    def keep(self, going: Sequence[bool]) -> list[int]:
        """As SlotBin's, for all bins; only the rows that go on are in use afterwards."""
        order: list[int] = []
        first = 0
        for index, (part, count) in enumerate(zip(self.bins, self._counts, strict=True)):
            moved = part.keep(going[first : first + count])
            order += [first + slot for slot in moved]
            self._counts[index] = len(moved)
            first += count
        return order

    def begin_step(self, positions: Tensor) -> None:
        """Says where each slot's next token stands: shape (slots in use,)."""
        for part, own in zip(self.bins, torch.split(positions, self._counts), strict=True):
            if len(own):
                part.begin_step(own)

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
        for part in self.bins:
            part.softcap = self.softcap
        parts = (torch.split(states, self._counts, dim=1) for states in (query, key, value))
        return torch.cat(
            [
                part.attend(layer, *own, scale, window)
                for part, *own in zip(self.bins, *parts, strict=True)
                if own[0].shape[1]
            ]
        )


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
