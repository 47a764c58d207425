"""Writes an ONNX graph node by node, its weights straight into a file beside it.

Memory stays bounded by one tensor: nothing is traced, and no model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.calibrate import DataFree, Quantiser
from export.quantise import Blocks, fits_bfloat16, quantise_blocks, to_bfloat16
from halve.errors import FamilyError

FloatArray = NDArray[np.float32]

OPSET = 20
IR_VERSION = 10
FUSED = "com.microsoft"
"""The domain of onnxruntime's fused operators."""
_ALIGNMENT_BYTES = 64
_INLINE_BYTES = 1024


@dataclass
class Stored:
    """What some weights take on disk."""

    parameters: int = 0
    size_bytes: int = 0
    """With scales and zeros."""

    def __add__(self, other: "Stored") -> "Stored":
        return Stored(self.parameters + other.parameters, self.size_bytes + other.size_bytes)


class GraphWriter:
    """One graph under construction.

    Weights go to `NAME.bin`, the graph to `NAME.onnx`. Values that fit bfloat16 are stored so and cast
    when the graph is loaded: the same float32 numbers in half the bytes. A graph in half precision
    stores and computes in float16 what is not quantised.
    """

    def __init__(
        self, folder: Path, name: str, quantise: Quantiser | None = None, half: bool = False
    ) -> None:
        self.name = name
        self.stored: dict[str, Stored] = {}
        """By the first part of the weights' names."""
        self.float_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self._quantise = quantise or DataFree()
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

    def output(self, name: str, shape: Sequence[str | int], dtype: int = TensorProto.FLOAT) -> None:
        """Declares an output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def narrow(self, value: str) -> str:
        """A float32 value in the type that the graph computes in."""
        if self.float_type == TensorProto.FLOAT:
            return value
        return self.node("Cast", [value], to=self.float_type)

    def wide(self, value: str, name: str) -> str:
        """A value of the graph's type as a float32 value of this name."""
        if self.float_type == TensorProto.FLOAT:
            return self.nodes("Identity", [value], [name])[0]
        return self.nodes("Cast", [value], [name], to=TensorProto.FLOAT)[0]

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
        """Stores a constant, in bfloat16 where that loses nothing, in float16 where that is computed in."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        if self.float_type == TensorProto.FLOAT16:
            return self._store(name, _to_half(name, values))
        if not fits_bfloat16(values):
            return self._store(name, values)
        stored = self._store(f"{name}_bf16", to_bfloat16(values), TensorProto.BFLOAT16)
        return self.node("Cast", [stored], to=TensorProto.FLOAT)

    def weight_in_rows(self, name: str, values: FloatArray) -> str:
        """Stores a constant in 8 bits, each row (all that shares a first index) with a scale.

        The runtime multiplies them out when it loads the graph: this saves bytes on disk alone.
        """
        rows = values.reshape(len(values), -1)
        blocks = quantise_blocks(rows, 8, rows.shape[1])
        codes = (blocks.codes.astype(np.int16) - 128).astype(np.int8).reshape(values.shape)
        scales = blocks.scales.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
        wide = self.node("Cast", [self._store(f"{name}_codes", codes)], to=TensorProto.FLOAT)
        factors = self._store(f"{name}_scales", scales, parameters=0)
        return self.narrow(self.node("Mul", [wide, factors]))

    def linear(
        self,
        name: str,
        x: str,
        weight: FloatArray,
        bias: FloatArray | None = None,
        *,
        bits: int = 32,
        block_size: int = 32,
        keys: Sequence[str] = (),
        factors: FloatArray | None = None,
    ) -> str:
        """(x @ weight.T + bias) * factors, with the weight (out, in) as it is or in blocks of 4 or 8 bits.

        Args:
            keys: the layers of the checkpoint whose weights follow each other in `weight`.
            factors: (out,), which cost nothing: weights are quantised without them, and scales take them in.
        """
        if bias is not None and factors is not None:
            bias = bias * factors
        if bits == 32:
            weight = weight if factors is None else weight * factors[:, None]
            out = self.node("MatMul", [x, self.weight(name, weight.T)])
            return (
                out if bias is None else self.node("Add", [out, self.weight(f"{name}_bias", bias)])
            )
        blocks = self._quantise(keys, weight, bits, block_size)
        return self.linear_blocks(
            name, x, blocks if factors is None else blocks.times(factors), bias
        )

    def linear_blocks(
        self, name: str, x: str, blocks: Blocks, bias: FloatArray | None = None
    ) -> str:
        """As `linear`, for a weight that is already quantised."""
        scales = self._store(f"{name}_scales", blocks.scales, parameters=0)
        if blocks.scales.dtype == np.float16:
            scales = self.node("Cast", [scales], to=TensorProto.FLOAT)
        weights = len(blocks.codes) * blocks.columns
        inputs = [x, self._store(f"{name}_codes", blocks.packed(), parameters=weights), scales]
        zeros = blocks.packed_zeros()
        if zeros is not None:
            inputs.append(self._store(f"{name}_zeros", zeros, parameters=0))
        if bias is not None:
            inputs += [""] * (5 - len(inputs))
            inputs.append(self.weight(f"{name}_bias", bias))
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

    def _store(
        self,
        name: str,
        values: NDArray[Any],
        dtype: int | None = None,
        parameters: int | None = None,
    ) -> str:
        counted = Stored(values.size if parameters is None else parameters, values.nbytes)
        part = name.split(".", maxsplit=1)[0].split("_", maxsplit=1)[0]
        self.stored[part] = self.stored.get(part, Stored()) + counted
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


def _to_half(name: str, values: FloatArray) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    if np.isinf(narrow).any():
        raise FamilyError(
            f"{name} holds {np.abs(values).max():.3g}, which float16 cannot",
            expected="values within 65504",
            mend="package this model in int8 or fp32",
        )
    return narrow
