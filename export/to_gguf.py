"""Writes a student's text decoder as a GGUF file, which llama.cpp runs.

Straight from the safetensors files, one tensor at a time. The file holds the whole text decoder: its
embedding table too, from which halve reads the prompt's embeddings. The audio encoder beside it is the
ONNX graph of an ONNX package. The tokenizer stays in tokenizer.json.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import QuantError, quant_shape_to_byte_shape, quantize
from numpy.typing import NDArray

from export.decoder_graph import check_layer
from export.geometry import Geometry
from export.gguf_file import BLOCK_SIZE, GGUF, HEAD, TABLE
from export.graph import Stored
from export.to_onnx import Bits, TensorReader, bits_per_weight, sizes, write_listening
from export.vocabulary import TokenIds
from halve.errors import FamilyError
from halve.families import Family, GgufLayout
from halve.shards import tensor_shapes

FloatArray = NDArray[np.float32]

_KINDS = {
    32: GGMLQuantizationType.F32,
    16: GGMLQuantizationType.F16,
    8: GGMLQuantizationType.Q8_0,
    4: GGMLQuantizationType.Q4_0,
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: its name and place in the file, and how to get its values."""

    name: str
    part: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    values: Callable[[], FloatArray]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        try:
            return tuple(quant_shape_to_byte_shape(self.shape, self.kind))
        except (ValueError, QuantError):
            raise FamilyError(
                f"{self.name} has rows of {self.shape[-1]} weights, which {self.kind.name} cannot hold",
                expected=f"a multiple of {BLOCK_SIZE}",
                mend="package this model with --precision fp16, or with --target onnx",
            ) from None


def write_gguf(
    folder: Path,
    student: Path,
    family: Family,
    processor: Any,
    bits: Bits,
    kept: TokenIds | None = None,
) -> dict[str, Any]:
    """Writes all parts of a GGUF package but its tokenizer.

    Args:
        bits: of the decoder, head and embeddings 32, 16, 8 (Q8_0) or 4 (Q4_0); of the encoder as in an
            ONNX package.
        kept: ascending ids of the tokens to keep; all where None.

    Returns:
        The facts that package.json records for the runtime.

    Raises:
        FamilyError: the model has a part that cannot be written.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(student), local_files_only=True)
    text = config.get_text_config()
    layout = _layout(family, text)
    geometry, rows = sizes(folder, config, kept)
    read = TensorReader(student)
    check_layer(read.suffixes(f"{family.disk_layers}0."))
    if not read.suffixes(family.disk_head):  # one table is both
        width = max(bits.embeddings, bits.head)
        bits = replace(bits, embeddings=width, head=width)
    tensors = list(_tensors(student, family, geometry, layout, read, bits, rows))
    writer = GGUFWriter(folder / GGUF, layout.architecture)
    _write_sizes(writer, geometry, text)
    for each in tensors:
        kind = each.kind
        size_bytes = int(np.prod(each.byte_shape))
        dtype = np.dtype(np.uint8)
        writer.add_tensor_info(each.name, each.byte_shape, dtype, size_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    stored: dict[str, Stored] = {}
    for each in tensors:
        data = _quantised(each)
        writer.write_tensor_data(data)
        counted = Stored(int(np.prod(each.shape)), data.nbytes)
        stored[each.part] = stored.get(each.part, Stored()) + counted
    writer.close()
    front_end, _, listening = write_listening(folder, config, family, processor, read, bits)
    stored |= listening
    stored["all"] = sum(stored.values(), Stored())
    return {
        "front_end": front_end,
        "decoder": asdict(geometry),
        "trimmed": kept is not None,
        "bits": asdict(bits),
        "bits_per_weight": bits_per_weight(stored),
    }


def _layout(family: Family, text: Any) -> GgufLayout:
    if text.model_type not in family.gguf_layouts:
        raise FamilyError(
            f"A decoder of type {text.model_type!r} cannot be written as GGUF yet",
            expected=", ".join(family.gguf_layouts),
            mend="package this model with --target checkpoint",
        )
    return family.gguf_layouts[text.model_type]


def _write_sizes(writer: GGUFWriter, geometry: Geometry, text: Any) -> None:
    writer.add_block_count(geometry.layers)
    writer.add_context_length(geometry.max_positions)
    writer.add_embedding_length(geometry.hidden)
    writer.add_feed_forward_length(int(text.intermediate_size))
    writer.add_head_count(geometry.heads)
    writer.add_head_count_kv(geometry.kv_heads)
    writer.add_key_length(geometry.head_dim)
    writer.add_value_length(geometry.head_dim)
    writer.add_rope_dimension_count(geometry.head_dim)
    writer.add_rope_freq_base(float(text.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(geometry.norm_epsilon)
    writer.add_vocab_size(geometry.vocabulary)
    writer.add_tokenizer_model("none")


def _tensors(
    student: Path,
    family: Family,
    geometry: Geometry,
    layout: GgufLayout,
    read: TensorReader,
    bits: Bits,
    rows: Any,
) -> Iterator[_Tensor]:
    """Every tensor of the file, in its order. A head that is tied to the embeddings is not stored."""
    shapes = {key: shape for key, (shape, _) in tensor_shapes(student).items()}

    def tensor(name: str, part: str, key: str, width: int, change: Any = None) -> _Tensor:
        shape = tuple(shapes[key])
        if part in ("embeddings", "head"):
            shape = (geometry.vocabulary, shape[1])
        kind = _KINDS[width] if len(shape) > 1 else GGMLQuantizationType.F32
        return _Tensor(
            name, part, shape, kind, lambda: read(key) if change is None else change(read(key))
        )

    def take(values: FloatArray) -> FloatArray:
        return values[rows]

    yield tensor(TABLE, "embeddings", f"{family.disk_embeddings}weight", bits.embeddings, take)
    if read.suffixes(family.disk_head):
        yield tensor(HEAD, "head", f"{family.disk_head}weight", bits.head, take)
    norm = family.disk_layers.removesuffix("layers.") + "norm.weight"
    yield tensor("output_norm.weight", "decoder", norm, 32)
    for layer in range(geometry.layers):
        prefix = f"{family.disk_layers}{layer}."
        for suffix in sorted(read.suffixes(prefix)):
            stem, _, kind = suffix.rpartition(".")
            name = f"blk.{layer}.{_LAYER_NAMES[stem]}.{kind}"
            change = _rotary_order(stem, geometry) if layout.neighbours else None
            yield tensor(name, "decoder", f"{prefix}{suffix}", bits.decoder, change)


def _rotary_order(stem: str, geometry: Geometry) -> Callable[[FloatArray], FloatArray] | None:
    """From a channel beside that half a head on, as transformers has them, to the two as neighbours."""
    heads = {"self_attn.q_proj": geometry.heads, "self_attn.k_proj": geometry.kv_heads}.get(stem)
    if heads is None:
        return None

    def change(values: FloatArray) -> FloatArray:
        halves = values.reshape(heads, 2, geometry.head_dim // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)

    return change


def _quantised(tensor: _Tensor) -> NDArray[np.uint8]:
    values = np.ascontiguousarray(tensor.values(), dtype=np.float32)
    with np.errstate(over="ignore"):
        stored = quantize(values, tensor.kind)
    if tensor.kind == GGMLQuantizationType.F16 and np.isinf(stored).any():
        raise FamilyError(
            f"{tensor.name} holds {np.abs(values).max():.3g}, which float16 cannot",
            expected="values within 65504",
            mend="package this model in int8 or fp32",
        )
    return np.ascontiguousarray(stored).view(np.uint8)
