"""Decoder layers as the search runs them: on flat lists of tokens, and no further than needed.

A layer of the common shape (norms before attention and before a gated MLP, rotary positions) is computed
from its own parts: fewer operations than the stock module, and in the last layer queries, output and
MLP only where the result is looked at. Whether a layer has that shape is not guessed from names alone:
both ways are run on random states, and only where they agree to rounding is the short way taken. Every
other layer runs as the stock module that it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from compress.packing import PackedRows, RowAttention, Tail
from halve.families import Family

ROUNDING = 8
"""How far the two ways may differ on average, in units of the number format's rounding."""
REORDERED_BELOW_BYTES = 1 << 30
"""Decoder weights up to this size are copied into the order that oneDNN reads: a fifth faster, for their size in memory."""
PROBE_ROWS = (5, 3)
"""Lengths of the rows of random states that the two ways are compared on."""

Rotary = Any
"""What goes beside the states through all layers, as `Family.enter` gives it: for a layer of the common shape,
cosines and sines of the tokens' positions, each (1, tokens, head dim)."""


Linear = Callable[[Tensor], Tensor]


class LayerRunner(Protocol):
    """One decoder layer."""

    def __call__(
        self, hidden: Tensor, rotary: Rotary, rows: RowAttention, tail: Tail | None = None
    ) -> Tensor:
        """Output states.

        Args:
            hidden: input states, shape (tokens, hidden).
            rows: knows which tokens belong together, and keeps their keys and values.
            tail: the tokens whose output is needed; all where not given.

        Returns:
            shape (tokens, hidden), or (tail tokens, hidden).
        """
        ...


class StockLayer:
    """A layer as stock transformers computes it."""

    def __init__(self, module: Any, family: Family) -> None:
        self._module, self._family = module, family

    def __call__(
        self, hidden: Tensor, rotary: Rotary, rows: RowAttention, tail: Tail | None = None
    ) -> Tensor:
        """See LayerRunner."""
        output: Tensor = self._module(
            hidden[None],
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            use_cache=False,
            halve_rows=rows,
            **self._family.layer_inputs(self._module, rotary, rows.shared),
        )[0]
        return output if tail is None else output[tail.tokens]


class OpenLayer:
    """A layer of the common shape, computed from its parts; the weights stay the module's own."""

    def __init__(self, module: Any, reorder: bool = False) -> None:
        attention, mlp = module.self_attn, module.mlp
        linear: Callable[[nn.Linear], Linear] = _reordered if reorder else lambda part: part
        self._index = attention.layer_idx
        self._dim = attention.head_dim
        self._scale = attention.scaling
        self._window = getattr(attention, "sliding_window", None)
        self._first, self._second = module.input_layernorm, module.post_attention_layernorm
        self._query, self._key = linear(attention.q_proj), linear(attention.k_proj)
        self._value, self._output = linear(attention.v_proj), linear(attention.o_proj)
        self._gate = _activated(mlp.gate_proj, mlp.act_fn, reorder)
        self._up, self._down = linear(mlp.up_proj), linear(mlp.down_proj)

    def __call__(
        self, hidden: Tensor, rotary: Rotary, rows: RowAttention, tail: Tail | None = None
    ) -> Tensor:
        """See LayerRunner."""
        cos, sin = rotary[0][0, :, None], rotary[1][0, :, None]
        normed = _normed(hidden, self._first)
        key = _turned(self._heads(normed, self._key), cos, sin)
        value = self._heads(normed, self._value)
        if tail is not None:
            hidden, normed, cos, sin = (part[tail.tokens] for part in (hidden, normed, cos, sin))
        query = _turned(self._heads(normed, self._query), cos, sin)
        attended = rows.attend(
            self._index,
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            self._scale,
            self._window,
            tail,
        )
        hidden = self._output(attended.reshape(len(hidden), -1)).add_(hidden)
        normed = _normed(hidden, self._second)
        gated = self._gate(normed).mul_(self._up(normed))
        return self._down(gated).add_(hidden)

    def _heads(self, states: Tensor, projection: Linear) -> Tensor:
        """Projected states (tokens, heads, head dim)."""
        return projection(states).view(len(states), -1, self._dim)


def _normed(states: Tensor, norm: Any) -> Tensor:
    """Root mean square norm over the last dimension."""
    return functional.rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of states (tokens, heads, head dim)."""
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned


def open_layers(layers: Sequence[Any], decoder: Any, family: Family) -> list[LayerRunner]:
    """A runner for each decoder layer. The stock attention must be `halve_packed` when this is called."""
    weights = [weight for layer in layers for weight in layer.parameters()]
    reorder = (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
        and sum(weight.nbytes for weight in weights) <= REORDERED_BELOW_BYTES
    )
    return [_open(layer, decoder, family, reorder) for layer in layers]


def _open(module: Any, decoder: Any, family: Family, reorder: bool) -> LayerRunner:
    stock = StockLayer(module, family)
    if not _has_parts(module):
        return stock
    for candidate in (OpenLayer(module, reorder), OpenLayer(module)):
        if _agree(stock, candidate, module, decoder):
            return candidate
    return stock


def _activated(part: nn.Linear, activation: Callable[[Tensor], Tensor], reorder: bool) -> Linear:
    """A linear part and the activation after it; SiLU is made while oneDNN writes the products."""
    if not reorder:
        return lambda states: activation(part(states))
    if type(activation) in (nn.SiLU, SiLUActivation):
        return _reordered(part, "swish")
    linear = _reordered(part)
    return lambda states: activation(linear(states))


def _reordered(part: nn.Linear, then: str = "none") -> Linear:
    """The linear part with its weight in blocks, as oneDNN takes it, and what is done to each product."""
    operations: Any = torch.ops.mkldnn
    weight, bias = operations._reorder_linear_weight(part.weight.detach(), None), part.bias

    def apply(states: Tensor) -> Tensor:
        return operations._linear_pointwise(states, weight, bias, then, [], "")  # type: ignore[no-any-return]

    return apply


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _only(module: Any, known: Sequence[str]) -> bool:
    return isinstance(module, nn.Module) and {name for name, _ in module.named_children()} <= set(
        known
    )


def _has_parts(module: Any) -> bool:
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    linear = [getattr(attention, name, None) for name in _ATTENTION]
    linear += [getattr(mlp, name, None) for name in _MLP[:3]]
    norms = [getattr(module, name, None) for name in _NORMS]
    return (
        all(type(part) is nn.Linear for part in linear)
        # Norms of queries and keys (Qwen3) and all else that is not put together here; in 16 bits the probe may not tell.
        and _only(attention, _ATTENTION)
        and _only(mlp, _MLP)
        and _only(module, ("self_attn", "mlp", *_NORMS))
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(hasattr(attention, name) for name in ("layer_idx", "head_dim", "scaling"))
        # A window that only the config knows of shows on long rows alone: the probe's are short.
        and (
            hasattr(attention, "sliding_window")
            or getattr(getattr(attention, "config", None), "sliding_window", None) is None
        )
        and hasattr(mlp, "act_fn")
    )


def _agree(stock: LayerRunner, opened: LayerRunner, module: Any, decoder: Any) -> bool:
    """Whether both ways give the same output on random states, for all tokens and for some."""
    weight = module.self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(sum(PROBE_ROWS), weight.shape[1], generator=generator)
    states = states.to(weight.device, weight.dtype)
    places = torch.cat([torch.arange(length) for length in PROBE_ROWS])[None].to(weight.device)
    rotary = decoder.rotary_emb(states[None], places)
    tail = Tail(torch.tensor([3, 4, 7], device=weight.device), [2, 1])
    expected = stock(states, rotary, PackedRows(PROBE_ROWS))
    allowed = ROUNDING * torch.finfo(weight.dtype).eps * float(expected.abs().mean())
    try:
        found = [
            opened(states, rotary, PackedRows(PROBE_ROWS)) - expected,
            opened(states, rotary, PackedRows(PROBE_ROWS), tail) - expected[tail.tokens],
        ]
    except RuntimeError:  # shapes that only the stock module knows how to put together
        return False
    return all(float(difference.abs().mean()) <= allowed for difference in found)
