"""Key-value caches of a decoder's rows: buffers that its graph reads and writes in place."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.geometry import Geometry

CacheArray = NDArray[Any]


class HostCaches:
    """Caches in numpy arrays, (slots, kv heads, capacity, head_dim), keys and values of each layer in turn."""

    def __init__(self, geometry: Geometry, slots: int, capacity: int, dtype: Any) -> None:
        self.capacity = capacity
        shape = (slots, geometry.kv_heads, capacity, geometry.head_dim)
        self._arrays: list[CacheArray] = [
            np.empty(shape, dtype) for _ in range(2 * geometry.layers)
        ]

    def bind(self, binding: Any, rows: slice) -> None:
        """Binds the caches of some slots as inputs and outputs; none is copied."""
        for index, array in enumerate(self._arrays):
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(array[rows])
            binding.bind_ortvalue_input(f"past_{_name(index)}", shared)
            binding.bind_ortvalue_output(_name(index), shared)

    def copy_rows(
        self, sources: Sequence[int], targets: Sequence[int], length: int, first: int = 0
    ) -> None:
        """Copies the positions from `first` up to `length` of slots to other slots, all at once."""
        for array in self._arrays:
            array[list(targets), :, first:length] = array[list(sources), :, first:length]

    def touch(self, rows: int) -> None:
        """Writes to every slot but the first `rows`: until then their memory is only promised."""
        for array in self._arrays:
            array[rows:] = 0

    def take_over(self, old: "HostCaches", slots: int) -> None:
        """Copies the first slots of smaller caches."""
        for before, after in zip(old._arrays, self._arrays, strict=True):
            after[:slots, :, : old.capacity] = before[:slots]


class DeviceCaches:
    """Caches in an accelerator's memory, bound by address.

    Rows are moved through the host's memory, which is slow: when a row leaves, and for beams at every step.
    """

    def __init__(
        self, geometry: Geometry, slots: int, capacity: int, dtype: Any, device: str
    ) -> None:
        self.capacity = capacity
        self._shape = (slots, geometry.kv_heads, capacity, geometry.head_dim)
        self._dtype, self._device = np.dtype(dtype), device
        empty = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._values = [
            empty(list(self._shape), dtype, device, 0) for _ in range(2 * geometry.layers)
        ]

    def bind(self, binding: Any, rows: slice) -> None:
        """See `HostCaches.bind`."""
        shape = [rows.stop - rows.start, *self._shape[1:]]
        skipped = rows.start * int(np.prod(self._shape[1:])) * self._dtype.itemsize
        for index, value in enumerate(self._values):
            where = (self._device, 0, self._dtype.type, shape, value.data_ptr() + skipped)
            binding.bind_input(f"past_{_name(index)}", *where)
            binding.bind_output(_name(index), *where)

    def copy_rows(
        self, sources: Sequence[int], targets: Sequence[int], length: int, first: int = 0
    ) -> None:
        """See `HostCaches.copy_rows`."""
        for value in self._values:
            array = np.array(value.numpy())
            array[list(targets), :, first:length] = array[list(sources), :, first:length]
            value.update_inplace(array)

    def touch(self, rows: int) -> None:
        """See `HostCaches.touch`; an accelerator's memory is taken when it is asked for."""

    def take_over(self, old: "DeviceCaches", slots: int) -> None:
        """See `HostCaches.take_over`."""
        for before, after in zip(old._values, self._values, strict=True):
            array = np.zeros(self._shape, self._dtype)
            array[:slots, :, : old.capacity] = before.numpy()[:slots]
            after.update_inplace(array)


def _name(index: int) -> str:
    return f"{'value' if index % 2 else 'key'}.{index // 2}"
