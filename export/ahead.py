"""Clips encoded in threads of their own while the rows before them are written."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

MOST_WORKERS = 4
"""More than this many clips at once would only take memory: a decoder does not consume them so fast."""
_CLIPS_A_WORKER = 2


class Ahead(Generic[Item, Made]):
    """A queue whose items are worked on before they are asked for; they come in their order."""

    def __init__(
        self,
        work: Callable[[Item], Made],
        items: Iterable[Item],
        pool: ThreadPoolExecutor | None = None,
        most: int = 0,
    ) -> None:
        """`most` items are under way in `pool` at a time."""
        self._work, self._waiting, self._pool, self._most = work, deque(items), pool, most
        self._under_way: deque[tuple[Item, Future[Made]]] = deque()
        self._fill()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._under_way)

    def take(self) -> tuple[Item, Made]:
        """The next item and what was made of it; what the work raises is raised here."""
        if self._pool is None:
            item = self._waiting.popleft()
            return item, self._work(item)
        item, future = self._under_way.popleft()
        self._fill()
        return item, future.result()

    def _fill(self) -> None:
        if self._pool is None:
            return
        while self._waiting and len(self._under_way) < self._most:
            item = self._waiting.popleft()
            self._under_way.append((item, self._pool.submit(self._work, item)))


@contextmanager
def working_ahead(
    work: Callable[[Item], Made], items: Iterable[Item], threads: int
) -> Iterator[Ahead[Item, Made]]:
    """Opens the queue; with one thread, each item is worked on when it is asked for."""
    if threads < 2:
        yield Ahead(work, items)
        return
    workers = min(threads, MOST_WORKERS)
    pool = ThreadPoolExecutor(workers)
    try:
        yield Ahead(work, items, pool, _CLIPS_A_WORKER * workers)
    finally:
        pool.shutdown(cancel_futures=True)
