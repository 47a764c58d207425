"""Runs jobs for clients that may leave: whole answers, and streams of events."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError, internal
from serve.formats import Transcript, event
from serve.jobs import Job
from serve.service import Service

READING_S = 10.0
"""A client may read so much longer than its job may take."""

T = TypeVar("T")
log = logging.getLogger("halve.serve")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client leaves; the body must have been read.

    Raises:
        ClientDisconnect: the client left.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leaving.cancel()
        await _ended(task)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ended(task: "asyncio.Future[Any]") -> None:
    """Cancels a task and waits until it has let go of what it holds."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


async def run_limited(service: Service, job: Job) -> Transcript:
    """Runs a job within the request's time."""
    async with service.time_limit(job.ticket.arrival_s):
        return await job.run()


class JobStream:
    """A running job whose text is read as it appears."""

    def __init__(self, service: Service, job: Job) -> None:
        self._texts: asyncio.Queue[str | None] = asyncio.Queue()
        self._first: str | None = None
        job.on_text = self._texts.put_nowait
        self._task = asyncio.create_task(run_limited(service, job))
        self._task.add_done_callback(lambda _: self._texts.put_nowait(None))

    async def begin(self) -> None:
        """Waits for the first text, so that what fails before it is an ordinary error.

        Raises:
            ApiError: the job failed.
        """
        self._first = await self._texts.get()
        if self._first is None:
            self._task.result()

    async def texts(self) -> AsyncIterator[str]:
        """Text as it appears."""
        text = self._first
        while text is not None:
            yield text
            text = await self._texts.get()

    def transcript(self) -> Transcript:
        """The result, after `texts` has ended.

        Raises:
            ApiError: the job failed on the way.
        """
        return self._task.result()

    async def close(self) -> None:
        """Cancels what still runs."""
        await _ended(self._task)


class EventStream(StreamingResponse):
    """Server-sent events that hold a request's resources until the last byte or the client's leave."""

    def __init__(
        self, events: AsyncIterator[bytes], held: AsyncExitStack, most_s: float | None = None
    ) -> None:
        """`most_s`: a client that has not taken it all by then is left."""
        super().__init__(_guarded(events), media_type="text/event-stream")
        self._held, self._most_s = held, most_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._most_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a stream was not read in its time")
        finally:
            await self._held.aclose()


async def _guarded(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Ends a stream that fails with an event that says so."""
    try:
        async for data in events:
            yield data
    except ApiError as error:
        yield event(error.body())
    except Exception:
        log.exception("a stream failed")
        yield event(internal().body())


async def start_stream(
    request: Request,
    service: Service,
    job: Job,
    events: Callable[[JobStream], AsyncIterator[bytes]],
    held: AsyncExitStack,
) -> EventStream:
    """Begins a job's stream; `held` is closed at its end, or here if it does not begin.

    Raises:
        ApiError: the job failed before its first text.
    """
    stream = JobStream(service, job)
    held.push_async_callback(stream.close)
    await while_connected(request, stream.begin())
    # The job has its own limit, and a client that does not read would hold what it holds for ever.
    spent_s = time.monotonic() - job.ticket.arrival_s
    left_s = service.settings.request_timeout_s - spent_s + READING_S
    return EventStream(events(stream), held.pop_all(), max(left_s, READING_S))
