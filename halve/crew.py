"""Threads that each compute alone: on a CPU, independent pieces of work side by side beat operations that are split."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Found = TypeVar("Found")


class Crew:
    """As many workers as torch has threads, each with one of them; one, the caller, on other devices.

    Open it as a context: inside, the caller's own operations have a worker's share of the threads too.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        """`most` is how many pieces of work there are: fewer workers share all threads evenly."""
        self._threads = torch.get_num_threads()
        self.size = self._threads if device.type == "cpu" else 1
        if most is not None:
            self.size = max(1, min(self.size, most))
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Crew":
        if self.size > 1:
            share = self._threads // self.size
            self._pool = ThreadPoolExecutor(
                self.size, initializer=torch.set_num_threads, initargs=(share,)
            )
            torch.set_num_threads(share)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._threads)

    def map(self, work: Callable[..., Found], *arguments: Iterable[Any]) -> list[Found]:
        """`work` of each item, in order, without gradients; the first exception is raised."""

        def without_gradients(*items: Any) -> Found:
            # The mode is each thread's own.
            with torch.inference_mode():
                return work(*items)

        run = map if self._pool is None else self._pool.map
        return list(run(without_gradients, *arguments))
