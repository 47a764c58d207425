"""Greedy decoding on an ONNX decoder: rows of a batch come and go, each at its own length.

A row's cache lies in a slot of buffers that the graph reads and writes in place. A new row's prompt is
read alone, unpadded, straight into its slot, so that it computes what it computes without neighbours;
from then on all rows take a step together. A row that stops makes way at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.caches import DeviceCaches, HostCaches
from export.geometry import Geometry, rotary_table
from export.vocabulary import TokenIds
from halve.beams import BeamSearch
from halve.errors import InputError
from halve.translate import is_looping

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


@dataclass
class Row:
    """One translation under way."""

    limit: int
    tokens: list[int] = field(default_factory=list)
    stopped: str = ""
    """end, limit or loop; empty while it goes on."""
    length: int = 0
    """Positions in the cache."""


class Decoder:
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
        self.session = session
        self.geometry = geometry
        self.embed = embed
        self._ends = frozenset(end_ids)
        self._stop_loops = stop_loops
        self._kept = kept
        half = any(each.type == "tensor(float16)" for each in session.get_inputs())
        self._cache_type = np.float16 if half else np.float32
        self._on_device = CUDA in session.get_providers()

    def new_caches(self, slots: int, capacity: int) -> Any:
        """Caches where the graph computes."""
        if self._on_device:
            return DeviceCaches(self.geometry, slots, capacity, self._cache_type, "cuda")
        return HostCaches(self.geometry, slots, capacity, self._cache_type)

    def choose(self, logits: FloatArray) -> list[int]:
        """The most likely token of each row of logits, (rows, vocabulary)."""
        places = logits.argmax(axis=1)
        chosen: list[int] = (places if self._kept is None else self._kept[places]).tolist()
        return chosen

    def beam_search(self, beams: int, limit: int) -> BeamSearch:
        """A search over this decoder's tokens."""
        loops = is_looping if self._stop_loops else None
        return BeamSearch(beams, limit, self._ends, self._kept, loops)

    def take(self, row: Row, token: int) -> None:
        """Notes the token a row says next, and whether it stops there."""
        if token in self._ends:
            row.stopped = "end"
            return
        row.tokens.append(token)
        if len(row.tokens) >= row.limit:
            row.stopped = "limit"
        elif self._stop_loops and is_looping(row.tokens):
            row.stopped = "loop"


class DecodeBatch:
    """Up to `slots` rows that take their steps together."""

    def __init__(self, decoder: Decoder, slots: int, capacity: int) -> None:
        """`capacity`: positions a row may take (prompt, audio and tokens); it grows when it must."""
        self._decoder = decoder
        self._slots = slots
        self.rows: list[Row] = []
        geometry = decoder.geometry
        self._embeddings = np.zeros((slots, 1, geometry.hidden), np.float32)
        self._logits = np.zeros((slots, geometry.vocabulary), np.float32)
        self._last = np.zeros(slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._allocate(capacity)

    @property
    def free(self) -> int:
        """Slots without a row."""
        return self._slots - len(self.rows)

    def add(self, inputs: FloatArray, limit: int) -> Row:
        """Reads a prompt and takes its first token; the row stays unless it stops with that.

        Args:
            inputs: embeddings of prompt and audio, (positions, hidden).

        Raises:
            InputError: no slot is free, or the row cannot fit the model's positions.
        """
        if not self.free:
            raise InputError(f"All {self._slots} slots are taken", expected="one free slot")
        self._reserve(len(inputs), limit)
        row = Row(limit, length=len(inputs))
        self._decoder.take(row, self._prefill(inputs))
        if not row.stopped:
            self.rows.append(row)
        return row

    def step(self) -> list[Row]:
        """One token for every row; returns the rows that stopped, which have left."""
        if not self.rows:
            return []
        tokens = [row.tokens[-1] for row in self.rows]
        logits = self._run(tokens, [row.length for row in self.rows])
        chosen = self._decoder.choose(logits)
        for row, token in zip(self.rows, chosen, strict=True):
            row.length += 1
            self._decoder.take(row, token)
        stopped = [row for row in self.rows if row.stopped]
        for row in stopped:
            self.remove(row)
        return stopped

    def _run(self, tokens: list[int], lengths: list[int]) -> FloatArray:
        """Reads one token into each of the first slots; the logits that follow, (rows, vocabulary)."""
        count = len(tokens)
        self._embeddings[:count, 0] = self._decoder.embed(tokens)
        self._last[:count] = lengths
        self._total[...] = max(lengths) + 1
        self._decoder.session.run_with_iobinding(self._binding(count))
        return self._logits[:count]

    def remove(self, row: Row) -> None:
        """Frees a row's slot (a cancelled row, or one that stopped); the last row moves into it."""
        slot = next(i for i, kept in enumerate(self.rows) if kept is row)
        last = self.rows.pop()
        if last is row:
            return
        self.rows[slot] = last
        self._caches.copy_rows([len(self.rows)], [slot], last.length)

    def search(self, inputs: FloatArray, limit: int, beams: int) -> Row:
        """Beam search for one prompt in a batch without rows; each beam takes a slot.

        Raises:
            InputError: the row cannot fit the model's positions.
        """
        decoder = self._decoder
        if self.rows or beams > self._slots:
            raise InputError(f"{beams} beams", expected=f"at most {self._slots}, and no other rows")
        self._reserve(len(inputs), limit)
        length = len(inputs)

        def step(tokens: list[int], parents: list[int]) -> FloatArray:
            nonlocal length
            places = list(range(len(parents)))
            if parents != places:
                self._caches.copy_rows(parents, places, length)
            logits = self._run(tokens, [length] * len(tokens))
            length += 1
            return logits

        found = decoder.beam_search(beams, limit).run(self.logits_after(inputs), step)
        return Row(limit, found.tokens, found.stopped, length)

    def _reserve(self, positions: int, limit: int) -> None:
        """Makes room for a prompt of so many positions and for new tokens."""
        need, most = positions + limit, self._decoder.geometry.max_positions
        if need > most:
            raise InputError(
                f"{positions} positions of prompt and audio and {limit} new tokens",
                expected=f"at most {most} positions together",
                mend="cut the audio, or lower the token limit",
            )
        if need > self._caches.capacity:
            self._allocate(need)

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

    def _prefill(self, inputs: FloatArray) -> int:
        return self._decoder.choose(self.logits_after(inputs)[None])[0]

    def logits_after(self, inputs: FloatArray) -> FloatArray:
        """Logits (vocabulary,) of the token after a prompt, which is read into the next free slot."""
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
