"""The ONNX graph of a Llama-layout text decoder with a key-value cache in place.

RMS norm, rotary grouped-query attention, gated SiLU: Llama, Mistral and Qwen2 are of this layout. The
cache's inputs and outputs are bound to the same buffers, so that a step writes one position and copies
none. Rows of a batch may be of different lengths: each has its own in `last_positions`.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from export.cache_scales import CacheScales
from export.geometry import Geometry
from export.graph import FUSED, GraphWriter
from halve.errors import FamilyError

FloatArray = NDArray[np.float32]
Read = Callable[[str], FloatArray]

_LAYER_WEIGHTS = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
}
_QKV_BIASES = {f"self_attn.{part}_proj.bias" for part in "qkv"}


def geometry_of(config: Any) -> Geometry:
    """Reads a transformers text configuration.

    Raises:
        FamilyError: it asks for what this layout has not.
    """
    rope = dict(config.rope_parameters or {})
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    for name, found, expected in (
        ("rotary embeddings", rope.get("rope_type", "default"), "default"),
        ("activation", _activation(config), "silu"),
        ("attention", "/".join(sorted(layer_types)), "full_attention"),
        ("attention window", _window(config), None),
        ("norms", "RMS" if hasattr(config, "rms_norm_eps") else "layer norm", "RMS"),
    ):
        if found != expected:
            raise _unsupported(f"{name} of type {found!r}", repr(expected))
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope["rope_theta"]) ** exponents
    return Geometry(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        vocabulary=int(config.vocab_size),
        norm_epsilon=float(config.rms_norm_eps),
        max_positions=int(config.max_position_embeddings),
        rotary_frequencies=tuple(float(value) for value in frequencies),
    )


def _activation(config: Any) -> str:
    """Gemma calls it by another name."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _window(config: Any) -> int | None:
    """The window of a model whose layers all have one (Mistral)."""
    if getattr(config, "layer_types", None):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _unsupported(found: str, expected: str) -> FamilyError:
    return FamilyError(
        f"A decoder with {found} cannot be written as ONNX yet",
        expected=expected,
        mend="package this model with --target checkpoint",
    )


def check_layer(suffixes: Collection[str]) -> bool:
    """Whether a layer of these tensors has attention biases.

    Raises:
        FamilyError: tensors are missing, or there are others.
    """
    biases = set(suffixes) & _QKV_BIASES
    other = set(suffixes) ^ _LAYER_WEIGHTS ^ biases
    if other or biases not in (set(), _QKV_BIASES):
        raise _unsupported(
            f"layers that differ in {', '.join(sorted(other or biases))}", "a Llama layout"
        )
    return bool(biases)


class DecoderWriter:
    """Writes `decoder.onnx`.

    Inputs: inputs_embeds (batch, steps, hidden), last_positions (batch,) int32, total_positions ()
    int32, cosines and sines (positions, head_dim / 2), past_key.N and past_value.N (batch, kv heads,
    capacity, head_dim). Outputs: logits (batch, vocabulary) of the last step, key.N, value.N. Keys and
    values are of the type that the graph computes in, or int8; all else is float32.
    """

    def __init__(
        self,
        graph: GraphWriter,
        geometry: Geometry,
        biased: bool,
        bits: int,
        head_bits: int,
        block_size: int,
        caches: Sequence[CacheScales] | None = None,
    ) -> None:
        """`caches`: of each layer, where keys and values are kept in 8 bits."""
        self._graph = graph
        self._caches = caches
        self._geometry = geometry
        self._biased = biased
        self._bits, self._head_bits, self._block_size = bits, head_bits, block_size

    def write(
        self, layers: str, norm_key: str, head: FloatArray, read: Read, head_key: str = ""
    ) -> list[Path]:
        """Writes the graph.

        Args:
            layers: the prefix of the layers' keys on disk, before their number.
            head: (vocabulary, hidden).
            head_key: its key on disk, where it is to be calibrated.
        """
        graph, geometry = self._graph, self._geometry
        hidden = graph.input("inputs_embeds", ["batch", "steps", geometry.hidden])
        hidden = graph.narrow(hidden)
        graph.input("last_positions", ["batch"], TensorProto.INT32)
        graph.input("total_positions", [], TensorProto.INT32)
        self._rotary = [
            graph.narrow(graph.input(name, ["positions", geometry.head_dim // 2]))
            for name in ("cosines", "sines")
        ]
        norm = graph.weight("layers.0.norm", read(f"{layers}0.input_layernorm.weight"))
        epsilon = geometry.norm_epsilon
        normed = graph.node(
            "SimplifiedLayerNormalization", [hidden, norm], axis=-1, epsilon=epsilon
        )
        for layer in range(geometry.layers):
            last = layer + 1 == geometry.layers
            following = norm_key if last else f"{layers}{layer + 1}.input_layernorm.weight"
            prefix = f"{layers}{layer}."
            normed, hidden = self._layer(layer, prefix, normed, hidden, read, read(following))
        flat = graph.node("Squeeze", [normed, graph.integers([1])])
        logits = graph.linear(
            "head",
            flat,
            head,
            bits=self._head_bits,
            block_size=self._block_size,
            keys=[head_key] if head_key else [],
        )
        graph.wide(logits, "logits")
        graph.output("logits", ["batch", geometry.vocabulary])
        return graph.save()

    def _layer(
        self, layer: int, prefix: str, normed: str, hidden: str, read: Read, next_norm: FloatArray
    ) -> tuple[str, str]:
        """One layer; returns the next norm's output and the residual stream."""
        attended = self._attention(layer, prefix, normed, read)
        if layer + 1 == self._geometry.layers:
            # Only the last step's logits are wanted, and nothing after this mixes steps.
            last = self._graph.integers([-1])
            attended = self._graph.node("Gather", [attended, last], axis=1)
            hidden = self._graph.node("Gather", [hidden, last], axis=1)
        out = self._linear(f"layers.{layer}.output", attended, [f"{prefix}self_attn.o_proj"], read)
        norm = read(f"{prefix}post_attention_layernorm.weight")
        normed, hidden = self._add_and_norm(f"layers.{layer}.mlp_norm", hidden, out, norm)
        down = self._mlp(layer, prefix, normed, read)
        return self._add_and_norm(f"layers.{layer}.next_norm", hidden, down, next_norm)

    def _linear(
        self,
        name: str,
        x: str,
        keys: Sequence[str],
        read: Read,
        biased: bool = False,
        factors: FloatArray | None = None,
    ) -> str:
        """One layer out of layers of the checkpoint that read the same."""
        weight = np.concatenate([read(f"{key}.weight") for key in keys])
        bias = np.concatenate([read(f"{key}.bias") for key in keys]) if biased else None
        return self._graph.linear(
            name,
            x,
            weight,
            bias,
            bits=self._bits,
            block_size=self._block_size,
            keys=keys,
            factors=factors,
        )

    def _attention(self, layer: int, prefix: str, normed: str, read: Read) -> str:
        graph, geometry = self._graph, self._geometry
        parts = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
        scales = self._caches[layer] if self._caches else None
        factors = scales.qkv_factors if scales else None
        packed = self._linear(f"layers.{layer}.qkv", normed, parts, read, self._biased, factors)
        shape: list[str | int] = ["batch", geometry.kv_heads, "capacity", geometry.head_dim]
        kept = TensorProto.INT8 if scales else graph.float_type
        key = graph.input(f"past_key.{layer}", shape, kept)
        value = graph.input(f"past_value.{layer}", shape, kept)
        inputs = [packed, "", "", key, value, "last_positions", "total_positions", *self._rotary]
        options: dict[str, Any] = {}
        if scales:
            inputs += ["", "", ""]
            inputs += [
                graph.weight(f"layers.{layer}.{name}_scale", np.array([scale], np.float32))
                for name, scale in (("key", scales.key), ("value", scales.value))
            ]
            options = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_TENSOR")
            options["kv_cache_bit_width"] = 8
        attended, _, _ = graph.nodes(
            "GroupQueryAttention",
            inputs,
            [None, f"key.{layer}", f"value.{layer}"],
            FUSED,
            num_heads=geometry.heads,
            kv_num_heads=geometry.kv_heads,
            do_rotary=1,
            **options,
        )
        graph.output(f"key.{layer}", shape, kept)
        graph.output(f"value.{layer}", shape, kept)
        return attended

    def _mlp(self, layer: int, prefix: str, normed: str, read: Read) -> str:
        graph = self._graph
        parts = [f"{prefix}mlp.{part}_proj" for part in ("gate", "up")]
        both = self._linear(f"layers.{layer}.gate_up", normed, parts, read)
        gate, up = graph.nodes("Split", [both], [None, None], axis=-1, num_outputs=2)
        # x * sigmoid(alpha * x) with alpha 1 is SiLU.
        gated = graph.node("Mul", [graph.node("QuickGelu", [gate], FUSED, alpha=1.0), up])
        return self._linear(f"layers.{layer}.down", gated, [f"{prefix}mlp.down_proj"], read)

    def _add_and_norm(
        self, name: str, hidden: str, addend: str, norm: FloatArray
    ) -> tuple[str, str]:
        normed, _, _, total = self._graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [hidden, addend, self._graph.weight(name, norm)],
            [None, "", "", None],
            FUSED,
            epsilon=self._geometry.norm_epsilon,
        )
        return normed, total
