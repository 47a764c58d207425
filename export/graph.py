"""Writes an ONNX graph node by node, its weights straight into a file beside it.

Memory stays bounded by one tensor: nothing is traced, and no model is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.quantise import Blocks, fits_bfloat16, quantise_blocks, to_bfloat16

FloatArray = NDArray[np.float32]

OPSET = 20
IR_VERSION = 10
FUSED = "com.microsoft"
"""The domain of onnxruntime's fused operators."""
_ALIGNMENT_BYTES = 64
_INLINE_BYTES = 1024


class GraphWriter:
    """One graph under construction.

    Weights go to `NAME.bin`, the graph to `NAME.onnx`. Values that fit bfloat16 are stored so and cast
    when the graph is loaded: the same float32 numbers in half the bytes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._folder = folder
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0
        self._data: BinaryIO = open(folder / f"{name}.bin", "wb")  # noqa: SIM115  closed by save

    def input(self, name: str, shape: Sequence[str | int], dtype: int = TensorProto.FLOAT) -> str:
        """Declares an input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[str | int]) -> None:
        """Declares a float32 output."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def node(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns that output's name."""
        return self.nodes(op, inputs, [None], domain, **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Adds a node; an output named None gets a fresh name, one named "" is not wanted."""
        self._count += 1
        name = f"{op}_{self._count}"
        names = [f"{name}_{i}" if given is None else given for i, given in enumerate(outputs)]
        self._nodes.append(
            helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes)
        )
        return names

    def integers(self, values: Sequence[int]) -> str:
        """A constant of int64."""
        return self._store(
            f"integers_{self._count}_{len(self._weights)}", np.array(values, np.int64)
        )

    def weight(self, name: str, values: FloatArray) -> str:
        """Stores a float32 constant, in bfloat16 where that loses nothing."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        if not fits_bfloat16(values):
            return self._store(name, values)
        stored = self._store(f"{name}_bf16", to_bfloat16(values), TensorProto.BFLOAT16)
        return self.node("Cast", [stored], to=TensorProto.FLOAT)

    def linear(
        self,
        name: str,
        x: str,
        weight: FloatArray,
        bias: FloatArray | None = None,
        *,
        bits: int = 32,
        block_size: int = 32,
    ) -> str:
        """x @ weight.T + bias, with the weight (out, in) in float32 or in blocks of 4 or 8 bits."""
        if bits == 32:
            out = self.node("MatMul", [x, self.weight(name, weight.T)])
            return (
                out if bias is None else self.node("Add", [out, self.weight(f"{name}_bias", bias)])
            )
        return self.linear_blocks(name, x, quantise_blocks(weight, bits, block_size), bias)

    def linear_blocks(
        self, name: str, x: str, blocks: Blocks, bias: FloatArray | None = None
    ) -> str:
        """As `linear`, for a weight that is already quantised."""
        scales = self._store(f"{name}_scales", blocks.scales)
        if blocks.scales.dtype == np.float16:
            scales = self.node("Cast", [scales], to=TensorProto.FLOAT)
        inputs = [x, self._store(f"{name}_codes", blocks.packed()), scales]
        if bias is not None:
            inputs += ["", "", self.weight(f"{name}_bias", bias)]
        # Level 4 multiplies 8-bit integers; a row's activations are scaled in blocks of that row alone.
        return self.node(
            "MatMulNBits",
            inputs,
            FUSED,
            K=blocks.columns,
            N=blocks.codes.shape[0],
            bits=blocks.bits,
            block_size=blocks.codes.shape[2],
            accuracy_level=4,
        )

    def _store(self, name: str, values: NDArray[Any], dtype: int | None = None) -> str:
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype) if dtype is None else dtype
        raw = np.ascontiguousarray(values).tobytes()
        tensor = TensorProto(name=name, data_type=dtype, dims=list(values.shape))
        if len(raw) <= _INLINE_BYTES:
            tensor.raw_data = raw
        else:
            self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT_BYTES))
            facts = {
                "location": f"{self.name}.bin",
                "offset": str(self._data.tell()),
                "length": str(len(raw)),
            }
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=value) for key, value in facts.items()
            )
            self._data.write(raw)
        self._weights.append(tensor)
        return name

    def save(self) -> list[Path]:
        """Writes the graph and returns its files."""
        self._data.close()
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=self._weights
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(FUSED, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="halve"
        )
        path = self._folder / f"{self.name}.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return [path, self._folder / f"{self.name}.bin"]
