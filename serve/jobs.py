"""One request's way: audio in, stretches to the engine, translations back in order."""

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from halve.languages import language
from halve.splitting import Stretch, stretches
from serve.audio_input import Recording
from serve.engine import Engine
from serve.errors import unavailable
from serve.formats import Transcript, Translated
from serve.models import Model
from serve.pieces import Outcome, Piece, Ticket

AHEAD = 8
"""Stretches of one request in the engine at once, which bounds the memory of long audio; one where many wait already."""


@dataclass(eq=False)
class Job:
    """A request that was understood: which recording, by which model, into which language."""

    model: Model
    engine: Engine
    recording: Recording
    lang: str
    window_s: float
    ticket: Ticket
    readers: ThreadPoolExecutor
    token_limit: int | None = None
    """The client's own limit on the tokens of the whole translation."""
    on_text: Callable[[str], None] | None = None
    """Called in the event loop with text as it appears."""
    ignored: tuple[str, ...] = ()
    _has_told: bool = False
    _has_submitted: bool = False
    _reading: "Future[Stretch | None] | None" = None

    async def run(self) -> Transcript:
        """Translates the recording.

        Raises:
            ApiError: the audio cannot be used, or the engine failed.
        """
        self.recording.check = self._check
        file = self.recording.take_file()
        source = stretches(self.recording.blocks(), self.window_s)
        try:
            return await self._run(source)
        finally:
            # Whatever is still in the engine is no longer wanted. A thread that is inside the decoder
            # cannot be stopped: nobody waits for it, and it closes the file when it comes back.
            self.ticket.cancelled = True
            self._close_when_read(source, file)

    def _close_when_read(self, source: Generator[Stretch], file: BinaryIO) -> None:
        def close(_: object = None) -> None:
            source.close()
            file.close()

        if self._reading is None:
            close()
            return
        self._reading.cancel()
        self._reading.add_done_callback(close)

    def _check(self) -> None:
        if self.ticket.cancelled:
            raise unavailable("The request was cancelled.")

    async def _next(self, source: Generator[Stretch]) -> Stretch | None:
        self._reading = self.readers.submit(next, source, None)
        return await asyncio.wrap_future(self._reading)

    async def _run(self, source: Generator[Stretch]) -> Transcript:
        waiting: deque[Waiting] = deque()
        done: list[Translated] = []
        # The next stretch is read before this one goes in: a recording of one stretch is
        # translated even if silent, as it is offline.
        stretch, only = await self._next(source), True
        while stretch is not None or waiting:
            if stretch is not None and len(waiting) < self._ahead():
                following = await self._next(source)
                only = only and following is None
                waiting.append(self._submit(stretch, only))
                stretch = following
                continue
            done.append(await self._finish(waiting.popleft()))
        return Transcript(
            model=self.model.id,
            lang=self.lang,
            duration_s=self.recording.duration_s,
            parts=tuple(done),
            ignored=self.ignored,
        )

    def _ahead(self) -> int:
        if self.on_text is not None or self.token_limit is not None:
            return 1
        return 1 if self.engine.is_crowded else AHEAD

    def _submit(self, stretch: Stretch, only: bool) -> "Waiting":
        if self.token_limit == 0:
            return Waiting(stretch, "limit", None)
        if stretch.is_silent and not only:
            return Waiting(stretch, "silence", None)
        piece = Piece(
            self.ticket,
            stretch.samples,
            stretch.duration_s,
            self.lang,
            limit=self.token_limit,
            on_text=None if self.on_text is None else self._teller(),
            is_first=not self._has_submitted,
        )
        self._has_submitted = True
        self.engine.submit(piece)
        future = asyncio.wrap_future(piece.future)
        future.add_done_callback(_take_note)
        return Waiting(stretch, "", future)

    def _teller(self) -> Callable[[str], None]:
        """Passes text into the event loop; a later stretch's first text brings the joiner."""
        loop, on_text = asyncio.get_running_loop(), self.on_text
        before = language(self.lang).joiner if self._has_told else ""

        def tell(text: str) -> None:
            nonlocal before
            assert on_text is not None
            loop.call_soon_threadsafe(on_text, before + text)
            before, self._has_told = "", True

        return tell

    async def _finish(self, waiting: "Waiting") -> Translated:
        start_s, end_s = waiting.stretch.start_s, waiting.stretch.end_s
        if waiting.future is None:
            return Translated(start_s, end_s, "", (), waiting.reason)
        outcome = await waiting.future
        found = outcome.translation
        if self.token_limit is not None:
            self.token_limit = max(0, self.token_limit - len(found.tokens))
        return Translated(start_s, end_s, found.text, tuple(found.tokens), found.stopped)


def _take_note(future: "asyncio.Future[Outcome]") -> None:
    """Looks at a piece's error: asyncio prints those that nobody saw, and a job that ends early
    leaves some behind."""
    if not future.cancelled():
        future.exception()


@dataclass(eq=False)
class Waiting:
    """A stretch on its way, or one that needs none, with the reason."""

    stretch: Stretch
    reason: str
    future: "asyncio.Future[Outcome] | None"
