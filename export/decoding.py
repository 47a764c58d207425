"""A decoder as an ONNX graph, driven row by row.

A row's cache lies in a slot of buffers that the graph reads and writes in place.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.blocks import leaves_one
from export.caches import DeviceCaches, HostCaches
from export.geometry import Geometry, rotary_table
from export.rows import Decoder, RowBatch
from export.vocabulary import WHOLE, Vocabulary
from halve.errors import GpuError

FloatArray = NDArray[np.float32]

_CAPACITY_STEP = 64
PROBE_POSITIONS = 4
"""Length of the prompt that a row is tried on, alone and beside others."""
PROBE_ROWS = (1, 2, 3, 5)


_CACHE_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}
"""What keys and values are kept in, by the type of a graph's last input, which is a cache."""
CUDA = "CUDAExecutionProvider"


def open_session(
    path: Path, threads: int | None, *, spin: bool, device: str = "cpu", arena: bool = True
) -> onnxruntime.InferenceSession:
    """Opens a graph.

    Args:
        device: cpu or cuda.
        threads: None leaves the choice to onnxruntime.
        spin: whether idle threads wait actively after a run: right for many short runs.
        arena: whether memory of a run is kept for the next one.

    Raises:
        GpuError: onnxruntime has a GPU's provider and cannot use it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes change from run to run
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = 3
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    cpu = "CPUExecutionProvider"
    if device != "cuda":
        return onnxruntime.InferenceSession(str(path), options, providers=[cpu])
    # What is missing is printed, and standard output is for translations.
    with redirect_stdout(sys.stderr):
        # CUDA's libraries as pip installs them, which the loader does not find by itself.
        onnxruntime.preload_dlls()
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=[CUDA, cpu], enable_fallback=0
            )
        except Exception as error:  # onnxruntime raises kinds of its own
            text = str(error).lower()
            if "cuda" not in text or "alloc" in text or "out of memory" in text:
                raise
            raise _no_gpu(str(error).splitlines()[0][:200]) from None
    if CUDA not in session.get_providers():
        raise _no_gpu("it goes on with the processor without a word")
    return session


def _no_gpu(why: str) -> GpuError:
    return GpuError(
        f"onnxruntime {onnxruntime.__version__} has no use of a GPU here ({why})",
        expected="an NVIDIA driver and the CUDA and cuDNN libraries that this onnxruntime was built for",
        mend="pip install 'onnxruntime-gpu[cuda,cudnn]', or name --device cpu",
    )


class RowThreads:
    """Steps of several rows in parts, each computed by one thread.

    Where rows must not be computed together (`export.blocks`) every row is a part; else a batch is cut into as
    many parts as there are threads, once each has `WORTH_IT` rows: threads that share no work need not wait
    for one another at every product, which is most of what small products cost.
    """

    WORTH_IT = 4

    def __init__(self, session: onnxruntime.InferenceSession, at_once: int, alone: bool) -> None:
        """`session`: computes with one thread, in whichever thread asks it to, unless `at_once` is 1."""
        self.session = session
        self._at_once, self._alone = at_once, alone
        self._pool = ThreadPoolExecutor(max(1, at_once - 1), thread_name_prefix="rows")

    def parts(self, rows: int) -> list[tuple[int, int]]:
        """First slot and end of each part; none where all rows take the step together."""
        if self._alone:
            return [(slot, slot + 1) for slot in range(rows)] if rows > 1 else []
        if self._at_once == 1 or rows < self.WORTH_IT * self._at_once:
            return []
        ends = [rows * (part + 1) // self._at_once for part in range(self._at_once)]
        return list(zip([0, *ends], ends, strict=False))

    def run(self, bindings: Sequence[Any]) -> None:
        """Runs all the bindings; returns when the last is done."""
        shares = [bindings[k :: self._at_once] for k in range(min(self._at_once, len(bindings)))]
        others = [self._pool.submit(self._run_each, share) for share in shares[1:]]
        try:
            self._run_each(shares[0])
        finally:
            wait(others)  # a part that goes on writes to rows that are given up when another fails
        for other in others:
            other.result()

    def _run_each(self, bindings: Sequence[Any]) -> None:
        for binding in bindings:
            self.session.run_with_iobinding(binding)

    def close(self) -> None:
        """Ends its threads."""
        self._pool.shutdown()


class OnnxDecoder(Decoder):
    """A decoder graph with what it takes to drive it."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        geometry: Geometry,
        embed: Callable[[Sequence[int]], FloatArray],
        end_ids: Sequence[int],
        stop_loops: bool = False,
        vocabulary: Vocabulary = WHOLE,
    ) -> None:
        """Takes an open graph. `vocabulary`: what its logits stand for, and which are never chosen."""
        super().__init__(geometry, embed, end_ids, stop_loops, vocabulary)
        self.session = session
        self.row_threads: RowThreads | None = None
        """What computes several rows in parts; None computes them together."""
        self.is_quantised = False
        """Whether its products are of few bits, and which kernel computes a row matters."""
        self.least_rows = 1
        """Rows that a step takes at least: idle ones keep a row company that would be computed otherwise alone."""
        self._cache_type = _CACHE_TYPES[session.get_inputs()[-1].type]
        self.on_device = CUDA in session.get_providers()
        """Whether the graph computes on a GPU."""

    def new_caches(self, slots: int, capacity: int) -> Any:
        """Caches where the graph computes."""
        if self.on_device:
            return DeviceCaches(self.geometry, slots, capacity, self._cache_type, "cuda")
        return HostCaches(self.geometry, slots, capacity, self._cache_type)


class DecodeBatch(RowBatch):
    """Rows on an ONNX graph."""

    _decoder: OnnxDecoder

    def __init__(self, decoder: OnnxDecoder, slots: int, capacity: int) -> None:
        """`capacity`: positions a row may take (prompt, audio and tokens); it grows when it must."""
        super().__init__(decoder, slots)
        geometry = decoder.geometry
        self._room = slots + decoder.least_rows - 1
        self._embeddings = np.zeros((self._room, 1, geometry.hidden), np.float32)
        self._logits = np.zeros((self._room, geometry.vocabulary), np.float32)
        self._last = np.zeros(self._room, np.int32)
        self._total = np.zeros((), np.int32)
        self._allocate(capacity)

    def _run(self, tokens: list[int], lengths: list[int]) -> FloatArray:
        count = len(tokens)
        self._embeddings[:count, 0] = self._decoder.embed(tokens)
        self._last[:count] = lengths
        self._total[...] = max(lengths) + 1
        rows = max(count, self._decoder.least_rows)
        self._last[count:rows] = 0  # an idle row attends to nothing but itself
        threads = self._decoder.row_threads
        parts = threads.parts(count) if threads else []
        if threads and parts:
            threads.run([self._binding(threads.session, *part) for part in parts])
        else:
            session = self._decoder.session
            session.run_with_iobinding(self._binding(session, 0, rows))
        return self._logits[:count]

    def _copy_rows(
        self, sources: list[int], targets: list[int], length: int, first: int = 0
    ) -> None:
        self._caches.copy_rows(sources, targets, length, first)

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
        self._caches = self._decoder.new_caches(self._room, capacity)
        if old is not None and self.rows:
            self._caches.take_over(old, len(self.rows))
        self._rotary = rotary_table(self._decoder.geometry, capacity)
        self._bindings: dict[tuple[int, int, int], Any] = {}

    def _binding(self, session: Any, first: int, end: int) -> Any:
        """The binding of a step of some slots' rows, made once."""
        key = (id(session), first, end)
        if key not in self._bindings:
            rows = slice(first, end)
            arrays = (self._embeddings[rows], self._last[rows], self._total, self._logits[rows])
            self._bindings[key] = self._bind(session, rows, *arrays)
        binding = self._bindings[key]
        if self._decoder.on_device:
            # Inputs are copied to a GPU as they are bound, and never again: a step has its own.
            value = onnxruntime.OrtValue.ortvalue_from_numpy
            for name, array in (
                ("inputs_embeds", self._embeddings),
                ("last_positions", self._last),
            ):
                binding.bind_ortvalue_input(name, value(array[first:end]))
            binding.bind_ortvalue_input("total_positions", value(self._total))
        return binding

    def logits_after(self, inputs: FloatArray) -> FloatArray:
        """See `RowBatch.logits_after`."""
        embeddings = np.ascontiguousarray(inputs, dtype=np.float32)
        if not (self._decoder.is_quantised and leaves_one(len(inputs))):
            return self._read(embeddings[None], [len(inputs) - 1])
        self._read(embeddings[None, :-1], [len(inputs) - 2])
        idle = self._decoder.least_rows - 1
        step = np.repeat(embeddings[-1:, None], 1 + idle, axis=0)
        return self._read(step, [len(inputs) - 1, *[0] * idle])

    def _read(self, embeddings: FloatArray, last: list[int]) -> FloatArray:
        """Reads embeddings, (rows, steps, hidden), into the first free slots; the first row's logits.

        Args:
            last: the position of each row's last step.
        """
        slot, rows = len(self.rows), len(embeddings)
        total = np.array(max(last) + 1, np.int32)
        logits = np.empty((rows, self._decoder.geometry.vocabulary), np.float32)
        session = self._decoder.session
        places = slice(slot, slot + rows)
        positions = np.array(last, np.int32)
        binding = self._bind(session, places, embeddings, positions, total, logits)
        session.run_with_iobinding(binding)
        return logits[0]

    def _bind(
        self,
        session: Any,
        rows: slice,
        embeddings: FloatArray,
        last: NDArray[np.int32],
        total: NDArray[np.int32],
        logits: FloatArray,
    ) -> Any:
        """Binds a run on some rows' slots; numpy keeps the memory, onnxruntime copies none of it."""
        binding = session.io_binding()
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


def rows_that_agree(decoder: OnnxDecoder) -> int | None:
    """The least number of rows from which on this processor computes a row to the same bits, however many there are.

    It is tried: which kernel runs is onnxruntime's choice, by processor, block and number of rows.

    Args:
        decoder: one that computes rows together, without `row_threads`.

    Returns:
        1, or 2 where only a lone row goes another way; None where a row's bits hang on its company.
    """
    most = max(PROBE_ROWS)
    batch = DecodeBatch(decoder, most, PROBE_POSITIONS + 1)
    shape = (PROBE_POSITIONS, decoder.geometry.hidden)
    prompt = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    # What it says next is a token that a trimmed vocabulary has.
    (token,) = decoder.choose(batch.logits_after(prompt)[None], first=True)
    batch._copy_rows([0] * (most - 1), list(range(1, most)), PROBE_POSITIONS)
    alone, *others = [
        batch._run([token] * rows, [PROBE_POSITIONS] * rows).copy() for rows in PROBE_ROWS
    ]
    if not all(np.array_equal(row, others[0][0]) for logits in others for row in logits):
        return None
    return 1 if np.array_equal(alone[0], others[0][0]) else 2
