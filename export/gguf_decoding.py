"""A decoder as a GGUF file, driven row by row through llama.cpp, which is fed embeddings.

Each row has a stream of the key-value cache of its own: neither its neighbours nor where it lies changes
what it attends to.
"""

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from export.geometry import Geometry
from export.rows import Decoder, RowBatch
from export.vocabulary import WHOLE, Vocabulary
from halve import environment
from halve.errors import HalveError, InputError

FloatArray = NDArray[np.float32]

_CHUNK = 512
"""Positions of a prompt that are read at once."""
_CAPACITY_STEP = 256
"""llama.cpp makes room for positions in steps of so many."""
_LOG_ERROR = 4
_said: deque[str] = deque(maxlen=4)


def _note(level: int, text: bytes, _: Any) -> None:
    """Keeps llama.cpp's errors for halve's messages, and the rest off the screen."""
    if level == _LOG_ERROR:
        _said.append(text.decode("utf8", errors="replace").strip())


_LOG = llama_cpp.llama_log_callback(_note)
"""llama.cpp holds its address: it must live as long as the process."""


class LlamaDecoder(Decoder):
    """A GGUF file in llama.cpp."""

    def __init__(
        self,
        path: Path,
        geometry: Geometry,
        embed: Callable[[Sequence[int]], FloatArray],
        end_ids: Sequence[int],
        *,
        exact: bool,
        threads: int | None = None,
        stop_loops: bool = False,
        vocabulary: Vocabulary = WHOLE,
    ) -> None:
        """Loads the file.

        Args:
            exact: keeps keys and values in float32 and attends to them without shortcuts.
            threads: None takes all cores.
            vocabulary: what its logits stand for, and which are never chosen.

        Raises:
            ValueError: llama.cpp cannot load it.
        """
        super().__init__(geometry, embed, end_ids, stop_loops, vocabulary)
        self.exact = exact
        self.threads = threads or environment.cores()
        llama_cpp.llama_log_set(_LOG, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        _said.clear()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ValueError("; ".join(_said) or "llama.cpp cannot load it")
        self._freed = weakref.finalize(self, llama_cpp.llama_model_free, self.model)
        rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        if rows != geometry.vocabulary:
            raise ValueError(f"{rows} tokens where package.json says {geometry.vocabulary}")

    def new_context(self, streams: int, capacity: int) -> Any:
        """A context whose cache holds `streams` rows of `capacity` positions each.

        Raises:
            InputError: more rows than llama.cpp takes, or not enough memory.
        """
        most = llama_cpp.llama_max_parallel_sequences()
        if streams > most:
            raise InputError(f"{streams - 1} rows at once", expected=f"at most {most - 1}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = streams
        params.n_ctx = streams * capacity
        params.n_batch = params.n_ubatch = max(_CHUNK, streams)
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        params.no_perf = True
        if self.exact:
            params.type_k = params.type_v = int(GGMLQuantizationType.F32)
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _said.clear()
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise InputError(
                f"llama.cpp cannot make room for {streams} rows of {capacity} positions "
                f"({'; '.join(_said)})",
                mend="translate fewer at once",
            )
        return context


class LlamaBatch(RowBatch):
    """Rows on llama.cpp; slot i is its sequence i."""

    _decoder: LlamaDecoder

    def __init__(self, decoder: LlamaDecoder, slots: int, capacity: int) -> None:
        """`capacity`: positions a row may take (prompt, audio and tokens); it grows when it must."""
        super().__init__(decoder, slots)
        # One stream more than slots: rows that change places pass through it.
        self._spare = slots
        self._streams = slots + (slots > 1)
        self._arrays = _BatchArrays(max(_CHUNK, slots))
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        # It may refuse: nothing of the batch changes before it is there.
        self._context = self._decoder.new_context(self._streams, capacity)
        self._capacity = capacity
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._freed = weakref.finalize(self, llama_cpp.llama_free, self._context)

    def _make_room(self, positions: int) -> None:
        if positions <= self._capacity:
            return
        if self.rows and self._context is None:
            raise _lost()
        states, before = [self._state(slot) for slot in range(len(self.rows))], self._capacity
        # Both may not fit into memory side by side.
        self._free()
        try:
            self._allocate(positions)
        except HalveError:
            if before:
                self._allocate(before)
                self._fill(states)
            raise
        self._fill(states)

    def _free(self) -> None:
        """Leaves a batch whose rows cannot go on; once they are removed it can take others."""
        self._freed()
        self._context, self._memory, self._capacity = None, None, 0

    def _fill(self, states: Sequence[Any]) -> None:
        for slot, state in enumerate(states):
            if not llama_cpp.llama_state_seq_set_data(self._context, state, len(state), slot):
                self._free()
                raise HalveError("llama.cpp cannot move a row to a larger cache")

    def _state(self, slot: int) -> Any:
        size_bytes = llama_cpp.llama_state_seq_get_size(self._context, slot)
        state = (ctypes.c_uint8 * size_bytes)()
        llama_cpp.llama_state_seq_get_data(self._context, state, size_bytes, slot)
        return state

    def logits_after(self, inputs: FloatArray) -> FloatArray:
        """See `RowBatch.logits_after`."""
        slot = len(self.rows)
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        for first in range(0, len(inputs), _CHUNK):
            part = inputs[first : first + _CHUNK]
            places = np.arange(first, first + len(part))
            wanted = places == len(inputs) - 1
            self._decode(part, places, np.full(len(part), slot), wanted)
        return self._logits(1)[0]

    def _run(self, tokens: list[int], lengths: list[int]) -> FloatArray:
        count = len(tokens)
        embeddings = self._decoder.embed(tokens)
        self._decode(embeddings, np.array(lengths), np.arange(count), np.ones(count, bool))
        return self._logits(count)

    def _decode(
        self,
        embeddings: FloatArray,
        positions: NDArray[np.int64],
        slots: NDArray[np.int64],
        wanted: NDArray[np.bool_],
    ) -> None:
        """Reads embeddings (n, hidden) at positions (n,) of slots (n,); logits come where wanted (n,)."""
        if self._context is None:
            raise _lost()
        batch = self._arrays.filled(embeddings, positions, slots, wanted)
        _said.clear()
        answer = llama_cpp.llama_decode(self._context, batch)
        if answer != 0:
            raise HalveError(f"llama_decode answered {answer} ({'; '.join(_said)})")

    def _logits(self, count: int) -> FloatArray:
        """The logits that the last step made, (count, vocabulary)."""
        shape = (count, self._decoder.geometry.vocabulary)
        found = llama_cpp.llama_get_logits(self._context)
        return np.array(np.ctypeslib.as_array(found, shape=shape))

    def _copy_rows(
        self, sources: list[int], targets: list[int], length: int, first: int = 0
    ) -> None:
        """A target that is a source too is only overwritten once it has been read; what is alike is copied too."""
        if self._context is None:
            return
        pending = {
            target: source
            for target, source in zip(targets, sources, strict=True)
            if target != source
        }
        while pending:
            free = [target for target in pending if target not in pending.values()]
            if free:
                self._copy(pending.pop(free[0]), free[0])
                continue
            # All that is left are rings: one row steps aside.
            aside = next(iter(pending))
            self._copy(aside, self._spare)
            pending = {t: self._spare if s == aside else s for t, s in pending.items()}

    def _copy(self, source: int, target: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)


def _lost() -> HalveError:
    return HalveError(
        "The cache of the rows under way was lost when there was no memory for a larger one",
        mend="translate fewer at once",
    )


class _BatchArrays:
    """The memory that a llama_batch points into."""

    def __init__(self, size: int) -> None:
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._slots = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        # One sequence an entry: pointers to the elements of `_slots`.
        start, width = self._slots.ctypes.data, self._slots.itemsize
        self._pointers = (start + width * np.arange(size)).astype(np.uintp)

    def filled(
        self, embeddings: FloatArray, positions: Any, slots: Any, wanted: Any
    ) -> llama_cpp.llama_batch:
        """A batch of rows; valid until the next."""
        count = len(embeddings)
        self._embeddings = np.ascontiguousarray(embeddings, np.float32)
        self._positions[:count], self._slots[:count] = positions, slots
        self._wanted[:count] = wanted
        fields = dict(llama_cpp.llama_batch._fields_)

        def pointer(name: str, array: NDArray[Any]) -> Any:
            return ctypes.cast(array.ctypes.data, fields[name])

        return llama_cpp.llama_batch(
            n_tokens=count,
            token=None,
            embd=pointer("embd", self._embeddings),
            pos=pointer("pos", self._positions),
            n_seq_id=pointer("n_seq_id", self._counts),
            seq_id=pointer("seq_id", self._pointers),
            logits=pointer("logits", self._wanted),
        )
