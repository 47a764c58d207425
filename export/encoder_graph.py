"""The ONNX graph of a Whisper-layout audio encoder with a pooled output, and its projector.

Attention in the stock model is masked to the valid positions. Here the positions past them are cut
off after the convolutions, the only operations that look past them: the same result without a mask.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from export.graph import FUSED, GraphWriter
from halve.errors import FamilyError

FloatArray = NDArray[np.float32]
Read = Callable[[str], FloatArray]
"""Reads one tensor of the checkpoint by its key on disk, as float32."""

NORM_EPSILON = 1e-5


def write_encoder(
    graph: GraphWriter,
    config: Any,
    tower: str,
    projector: str,
    read: Read,
    bits: int,
    block_size: int,
) -> list[Path]:
    """Writes `encoder.onnx`: features (1, mels, frames), positions (1,) -> embeddings (1, out, hidden).

    Args:
        config: the tower's transformers configuration.
        tower, projector: prefixes of their keys on disk.
        bits: 32, or 8 or 4 for the linear layers' weights; convolutions, positions and the projector
            are then stored in 8.

    Raises:
        FamilyError: the tower is not of this layout.
    """
    _check(config)
    features = graph.narrow(graph.input("features", [1, int(config.num_mel_bins), "frames"]))
    positions = graph.input("positions", [1], TensorProto.INT64)
    states = _convolutions(graph, features, positions, tower, read, bits)
    for layer in range(int(config.encoder_layers)):
        prefix = f"{tower}layers.{layer}."
        states = _layer(graph, states, prefix, config, read, bits, block_size)
    pooled = graph.node("Transpose", [states], perm=[0, 2, 1])
    pooled = graph.node("AveragePool", [pooled], kernel_shape=[2], strides=[2])
    pooled = graph.node("Transpose", [pooled], perm=[0, 2, 1])
    normed = _norm(graph, pooled, f"{tower}layer_norm", read)
    weight, bias = read(f"{projector}linear.weight"), read(f"{projector}linear.bias")
    kernel = weight.T if bits == 32 else weight
    table = _table(graph, "projector", kernel, bits)
    if bits != 32:
        table = graph.node("Transpose", [table], perm=[1, 0])
    embeddings = graph.node("MatMul", [normed, table])
    embeddings = graph.node("Add", [embeddings, graph.weight("projector_bias", bias)])
    graph.wide(embeddings, "embeddings")
    graph.output("embeddings", [1, "audio_positions", weight.shape[0]])
    return graph.save()


def _check(config: Any) -> None:
    activation = getattr(config, "activation_function", "gelu")
    if activation != "gelu" or getattr(config, "scale_embedding", False):
        raise FamilyError(
            f"An audio encoder with activation {activation!r} cannot be written as ONNX yet",
            expected="a Whisper encoder (GELU, unscaled embeddings)",
            mend="package this model with --target checkpoint",
        )


def _table(graph: GraphWriter, name: str, values: FloatArray, bits: int) -> str:
    """A weight that the graph reads as floats: exact, or in 8 bits on disk."""
    return graph.weight(name, values) if bits == 32 else graph.weight_in_rows(name, values)


def _convolutions(
    graph: GraphWriter, features: str, positions: str, tower: str, read: Read, bits: int
) -> str:
    states = features
    for name, stride in (("conv1", 1), ("conv2", 2)):
        weight = _table(graph, name, read(f"{tower}{name}.weight"), bits)
        bias = graph.weight(f"{name}_bias", read(f"{tower}{name}.bias"))
        states = graph.node("Conv", [states, weight, bias], pads=[1, 1], strides=[stride])
        states = graph.node("Gelu", [states], FUSED)
    states = graph.node("Transpose", [states], perm=[0, 2, 1])
    start = graph.integers([0])
    states = graph.node("Slice", [states, start, positions, graph.integers([1])])
    table = _table(graph, "positions_table", read(f"{tower}embed_positions.weight"), bits)
    table = graph.node("Slice", [table, start, positions, graph.integers([0])])
    return graph.node("Add", [states, table])


def _norm(graph: GraphWriter, states: str, prefix: str, read: Read) -> str:
    weight = graph.weight(f"{prefix}.weight", read(f"{prefix}.weight"))
    bias = graph.weight(f"{prefix}.bias", read(f"{prefix}.bias"))
    return graph.node("LayerNormalization", [states, weight, bias], axis=-1, epsilon=NORM_EPSILON)


def _layer(
    graph: GraphWriter,
    states: str,
    prefix: str,
    config: Any,
    read: Read,
    bits: int,
    block_size: int,
) -> str:
    def linear(x: str, name: str) -> str:
        key = f"{prefix}{name}"
        return graph.linear(
            key,
            x,
            read(f"{key}.weight"),
            read(f"{key}.bias"),
            bits=bits,
            block_size=block_size,
            keys=[key],
        )

    normed = _norm(graph, states, f"{prefix}self_attn_layer_norm", read)
    weight, bias = _packed_attention(prefix, read)
    parts = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
    packed = graph.linear(
        f"{prefix}qkv", normed, weight, bias, bits=bits, block_size=block_size, keys=parts
    )
    query, key, value = graph.nodes("Split", [packed], [None] * 3, axis=-1, num_outputs=3)
    heads = int(config.encoder_attention_heads)
    attended = graph.node("MultiHeadAttention", [query, key, value], FUSED, num_heads=heads)
    states = graph.node("Add", [states, linear(attended, "self_attn.out_proj")])
    normed = _norm(graph, states, f"{prefix}final_layer_norm", read)
    inner = graph.node("Gelu", [linear(normed, "fc1")], FUSED)
    return graph.node("Add", [states, linear(inner, "fc2")])


def _packed_attention(prefix: str, read: Read) -> tuple[FloatArray, FloatArray]:
    """Query, key and value projections as one; Whisper's keys have no bias."""
    parts = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
    weight = np.concatenate([read(f"{part}.weight") for part in parts])
    query_bias, value_bias = read(f"{parts[0]}.bias"), read(f"{parts[2]}.bias")
    return weight, np.concatenate([query_bias, np.zeros_like(query_bias), value_bias])
