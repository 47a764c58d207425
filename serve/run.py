"""Runs the server until it is told to stop."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from halve.errors import InputError
from halve.progress import SILENT, Progress
from serve.app import create_app
from serve.registry import OpenTranslator
from serve.service import Service
from serve.settings import ServeSettings

log = logging.getLogger("halve.serve")

KEEP_ALIVE_S = 75
SIGNAL_POLL_S = 0.2
CLOSING_S = 2
"""After draining: for connections to take their last bytes."""

HEAPS = 2
_M_ARENA_MAX = -8
"""From glibc's malloc.h."""


def run_server(
    settings: ServeSettings,
    progress: Progress = SILENT,
    *,
    open_translator: OpenTranslator | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; running requests are finished within drain_s.

    A second signal ends it at once. Says one line with the address when it is ready.

    Raises:
        InputError: the settings, the address or the API key file cannot be used.
        HalveError: the first model cannot be loaded.
    """
    warning = settings.check_exposure()
    if warning:
        progress.warn(warning)
    _show_log(progress)
    limit_heaps()
    listener = _listen(settings)
    with contextlib.closing(listener):
        stopped = asyncio.run(_serve(settings, progress, listener, open_translator))
    if not stopped:
        # An engine is inside a translation that cannot be interrupted; unwinding the interpreter
        # under it can crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def limit_heaps() -> bool:
    """Lets threads share two of glibc's heaps: with one each, what they free stays theirs; a tenth less memory under load.

    Returns:
        whether this C library could be told.
    """
    try:
        told: int = ctypes.CDLL(None).mallopt(_M_ARENA_MAX, HEAPS)
    except (AttributeError, OSError, TypeError):  # another C library, or none to load so
        return False
    return told == 1


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only sockets that name their protocol get TCP_NODELAY from asyncio; without it each answer waits
    # 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Listening comes when the model is loaded: until then connections are refused.
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise _no_address(settings, error) from None
    return listener


def _no_address(settings: ServeSettings, error: OSError) -> InputError:
    return InputError(
        f"Cannot listen on {settings.host}:{settings.port} ({error.strerror or error})",
        mend="choose another --port (0 takes a free one) or --host",
    )


async def _serve(
    settings: ServeSettings,
    progress: Progress,
    listener: socket.socket,
    open_translator: OpenTranslator | None,
) -> bool:
    service = Service(settings, open_translator)
    config = uvicorn.Config(
        create_app(settings, service=service),
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSING_S,
    )
    server = _Server(config, service)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    names = ", ".join(service.registry.models)
    announce = f"Serving on http://{host}:{listener.getsockname()[1]} ({names})"
    try:
        with server.capture_signals():
            if await server.load():
                try:
                    # Another server may have bound the same port, and listened first.
                    listener.listen(config.backlog)
                except OSError as error:
                    raise _no_address(settings, error) from None
                await server.run_until_told(listener, lambda: progress.message(announce))
    finally:
        stopped = await service.stop()
    return stopped


class _Server(uvicorn.Server):
    """uvicorn, draining before it closes its socket and exiting with 0 after SIGTERM."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loading: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._announce: Callable[[], None] = lambda: None
        self._loop = asyncio.get_running_loop()

    async def load(self) -> bool:
        """Loads the first model; False if a signal came before it was.

        Raises:
            HalveError: it cannot be loaded.
        """
        self._loading = asyncio.create_task(self._service.start())
        # A signal that comes just as the loop goes to sleep is seen when it wakes.
        while not self._loading.done():
            await asyncio.wait([self._loading], timeout=SIGNAL_POLL_S)
        if self._loading.cancelled():
            return False
        self._loading.result()
        return True

    async def run_until_told(self, listener: socket.socket, announce: Callable[[], None]) -> None:
        """Serves on an open socket; `announce` is called once it does."""
        self._announce = announce
        await self.serve(sockets=[listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn would raise the signal again afterwards and so exit with it.
        kept = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            return
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d requests run", self._service.running)
        try:
            if not await self._service.drain():
                log.warning("%d requests were not finished in time", self._service.running)
        finally:
            self.should_exit = True


class _ProgressHandler(logging.Handler):
    """Shows the server's warnings where progress goes."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._progress.warn(self.format(record))
        except Exception:  # a full disk must not end the thread that has something to say
            self.handleError(record)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what uvicorn says of each request of clients that offer another protocol, as Java's do."""
    return not record.getMessage().startswith(
        ("Unsupported upgrade request", "No supported WebSocket library")
    )


def _show_log(progress: Progress) -> None:
    for name in ("halve.serve", "uvicorn.error"):
        logger = logging.getLogger(name)
        handler = _ProgressHandler(progress)
        handler.addFilter(_is_news)
        logger.handlers = [handler]
        logger.propagate = False
    # It warns of every byte of a damaged form; the client is told.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
