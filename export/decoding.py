"""A decoder as an ONNX graph, driven row by row.

A row's cache lies in a slot of buffers that the graph reads and writes in place.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.caches import DeviceCaches, HostCaches
from export.geometry import Geometry, rotary_table
from export.rows import Decoder, RowBatch
from export.vocabulary import TokenIds

FloatArray = NDArray[np.float32]

_CAPACITY_STEP = 64


CUDA = "CUDAExecutionProvider"


def open_session(
    path: Path, threads: int | None, *, spin: bool, device: str = "cpu"
) -> onnxruntime.InferenceSession:
    """Opens a graph.

    Args:
        device: cpu or cuda.
        threads: None leaves the choice to onnxruntime.
        spin: whether idle threads wait actively after a run: right for many short runs.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes change from run to run
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = [CUDA] if device == "cuda" else []
    return onnxruntime.InferenceSession(
        str(path), options, providers=[*providers, "CPUExecutionProvider"]
    )


class OnnxDecoder(Decoder):
    """A decoder graph with what it takes to drive it."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        geometry: Geometry,
        embed: Callable[[Sequence[int]], FloatArray],
        end_ids: Sequence[int],
        stop_loops: bool = False,
        kept: TokenIds | None = None,
    ) -> None:
        """`kept`: token id of each logit where the vocabulary is trimmed."""
        super().__init__(geometry, embed, end_ids, stop_loops, kept)
        self.session = session
        half = any(each.type == "tensor(float16)" for each in session.get_inputs())
        self._cache_type = np.float16 if half else np.float32
        self._on_device = CUDA in session.get_providers()

    def new_caches(self, slots: int, capacity: int) -> Any:
        """Caches where the graph computes."""
        if self._on_device:
            return DeviceCaches(self.geometry, slots, capacity, self._cache_type, "cuda")
        return HostCaches(self.geometry, slots, capacity, self._cache_type)


class DecodeBatch(RowBatch):
    """Rows on an ONNX graph."""

    _decoder: OnnxDecoder

    def __init__(self, decoder: OnnxDecoder, slots: int, capacity: int) -> None:
        """`capacity`: positions a row may take (prompt, audio and tokens); it grows when it must."""
        super().__init__(decoder, slots)
        geometry = decoder.geometry
        self._embeddings = np.zeros((slots, 1, geometry.hidden), np.float32)
        self._logits = np.zeros((slots, geometry.vocabulary), np.float32)
        self._last = np.zeros(slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._allocate(capacity)

    def _run(self, tokens: list[int], lengths: list[int]) -> FloatArray:
        count = len(tokens)
        self._embeddings[:count, 0] = self._decoder.embed(tokens)
        self._last[:count] = lengths
        self._total[...] = max(lengths) + 1
        self._decoder.session.run_with_iobinding(self._binding(count))
        return self._logits[:count]

    def _copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        self._caches.copy_rows(sources, targets, length)

    def _make_room(self, positions: int) -> None:
        if positions > self._caches.capacity:
            self._allocate(positions)

    def reserve(self, positions: int) -> None:
        """See `RowBatch.reserve`."""
        super().reserve(positions)
        self._caches.touch(len(self.rows))

    def _allocate(self, capacity: int) -> None:
        """Makes buffers of at least `capacity` positions and keeps the rows' caches."""
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        old = getattr(self, "_caches", None)
        self._caches = self._decoder.new_caches(self._slots, capacity)
        if old is not None and self.rows:
            self._caches.take_over(old, len(self.rows))
        self._rotary = rotary_table(self._decoder.geometry, capacity)
        self._bindings: dict[int, Any] = {}

    def _binding(self, count: int) -> Any:
        """The binding of a step of `count` rows, made once."""
        if count not in self._bindings:
            rows = slice(0, count)
            self._bindings[count] = self._bind(
                rows, self._embeddings[rows], self._last[rows], self._total, self._logits[rows]
            )
        return self._bindings[count]

    def logits_after(self, inputs: FloatArray) -> FloatArray:
        """See `RowBatch.logits_after`."""
        slot = len(self.rows)
        embeddings = np.ascontiguousarray(inputs, dtype=np.float32)[None]
        last = np.array([len(inputs) - 1], np.int32)
        total = np.array(len(inputs), np.int32)
        logits = np.empty((1, self._decoder.geometry.vocabulary), np.float32)
        binding = self._bind(slice(slot, slot + 1), embeddings, last, total, logits)
        self._decoder.session.run_with_iobinding(binding)
        return logits[0]

    def _bind(
        self,
        rows: slice,
        embeddings: FloatArray,
        last: NDArray[np.int32],
        total: NDArray[np.int32],
        logits: FloatArray,
    ) -> Any:
        """Binds a run on some rows' slots; numpy keeps the memory, onnxruntime copies none of it."""
        binding = self._decoder.session.io_binding()
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        for name, array in (
            ("inputs_embeds", embeddings),
            ("last_positions", last),
            ("total_positions", total),
            ("cosines", self._rotary[0]),
            ("sines", self._rotary[1]),
        ):
            binding.bind_ortvalue_input(name, value(array))
        binding.bind_ortvalue_output("logits", value(logits))
        self._caches.bind(binding, rows)
        return binding
