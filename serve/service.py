"""What one server holds: settings, models, counters, private directory, and the work in hand."""

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from halve import environment
from halve.errors import InputError
from halve.models import family_of, resolve_model
from halve.translate import Translator
from serve.engine import Engine
from serve.errors import busy, draining, too_slow
from serve.metrics import Metrics
from serve.models import Model
from serve.registry import OpenTranslator, Registry
from serve.settings import ServeSettings
from serve.upload import BodyRoom, no_space

log = logging.getLogger("halve.serve")

READERS = 4
"""Threads that decode uploads."""
DRAIN_POLL_S = 0.05
BODIES_BYTES = 192 * 1024 * 1024
"""Chat bodies are held in memory: this much of them at once, beside what is decoded of them (another one and three quarters)."""


class Service:
    """The state of a server; made and used in the event loop."""

    def __init__(
        self, settings: ServeSettings, open_translator: OpenTranslator | None = None
    ) -> None:
        self.settings = settings
        self.api_key = settings.read_api_key()
        self.metrics = Metrics()
        self.registry = Registry(settings, open_translator or open_model, self.metrics)
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="decode")
        self.is_draining = False
        self.running = 0
        """Requests for work now in the server, uploads included."""
        self.body_room = BodyRoom(BODIES_BYTES)
        self._directory: Path | None = None
        self._started = False
        self._stopped = True
        self._gave_up = False
        self._limits: set[asyncio.Timeout] = set()

    @property
    def directory(self) -> Path:
        """The private directory for uploads (0700); made anew where something removed it.

        Raises:
            InputError: it cannot be made.
            ApiError: it cannot be made anew (503).
        """
        if self._directory is None:
            self._directory = self._make_directory()
        elif not self._directory.is_dir():
            log.warning("the directory for uploads %s is gone; another is made", self._directory)
            try:
                self._directory = self._make_directory()
            except InputError as error:
                log.warning("%s", error)
                raise no_space() from None
        return self._directory

    def _make_directory(self) -> Path:
        try:
            return Path(tempfile.mkdtemp(prefix="halve-serve-", dir=self.settings.temp_dir))
        except OSError as error:
            place = self.settings.temp_dir or tempfile.gettempdir()
            raise InputError(
                f"No directory for uploads can be made in {place} ({error.strerror})",
                mend="name a directory that can be written with --temp-dir",
            ) from None

    async def start(self) -> None:
        """Makes the directory for uploads and loads the first model; a second call does nothing.

        Raises:
            InputError: the directory cannot be made.
            HalveError: the model cannot be loaded.
        """
        if not self._started:
            self._started = True
            self._directory = self.directory
            await self.registry.load_first()

    async def drain(self) -> bool:
        """Refuses new work and waits for what runs; False if drain_s was not enough."""
        self.is_draining = True
        until_s = time.monotonic() + self.settings.drain_s
        while self.running and time.monotonic() < until_s:
            await asyncio.sleep(DRAIN_POLL_S)
        if not self.running:
            return True
        # Those who still wait hear 503 instead of a closed connection.
        self._gave_up = True
        for limit in self._limits:
            with suppress(RuntimeError):  # one that is just running out by itself
                limit.reschedule(asyncio.get_running_loop().time())
        return False

    async def stop(self, wait_s: float = 5.0) -> bool:
        """Unloads the models and removes the private directory; False if an engine still runs."""
        self.is_draining = True
        self._stopped = await self.registry.close(wait_s) and self._stopped
        self.readers.shutdown(wait=False, cancel_futures=True)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        return self._stopped

    @asynccontextmanager
    async def borrow(self, model_id: str) -> AsyncIterator[tuple[Model, Engine]]:
        """A loaded model with a place in its queue.

        Raises:
            ApiError: unknown model (404), no place (429), not loadable (503).
        """
        model = self.registry.find(model_id)
        if model.taken_on >= self.settings.max_queue:
            raise busy(
                f"The model {model.id} has {model.taken_on} requests waiting; try again later."
            )
        async with self.registry.borrow(model_id) as lent:
            yield lent

    @asynccontextmanager
    async def time_limit(self, arrival_s: float) -> AsyncIterator[None]:
        """Ends what runs inside when the request's time is over.

        Raises:
            ApiError: it was (504).
        """
        limit_s = self.settings.request_timeout_s
        left_s = arrival_s + limit_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left_s)) as limit:
                self._limits.add(limit)
                try:
                    yield
                finally:
                    self._limits.discard(limit)
        except TimeoutError:
            raise (draining() if self._gave_up else too_slow(limit_s)) from None

    def window_s(self, model: Model) -> float:
        """The longest stretch of audio to translate at once."""
        longest_s = model.max_audio_s or 30.0
        asked_s = self.settings.segment_s
        return longest_s if asked_s is None else min(longest_s, asked_s)


def open_model(path: str, settings: ServeSettings) -> Translator:
    """Opens a model with the runtime that the settings ask for; runs in the engine's thread.

    Raises:
        InputError: a model that reads texts: the server's interface is for audio.
    """
    if family_of(resolve_model(path, weights=False)).reads == "text":
        raise InputError(
            f"{path} is a text model, and the server takes audio",
            expected="a model that listens",
            mend="translate texts with `halve translate --model DIR --lang CODE FILE`",
        )
    if settings.engine == "plain":
        from serve.plain import open_plain

        return open_plain(path, threads=settings.threads, device=settings.device)
    from export.manifest import MANIFEST, read_manifest
    from export.runtime import open_translator

    folder = Path(path)
    threads = rows_at_once = settings.threads
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    packaged = manifest is not None and manifest.target != "checkpoint"
    # Of packages only fp16 ONNX knows a GPU: others compute on the processor beside checkpoints that are on one.
    has_device = manifest is None or not packaged or manifest.precision == "fp16"
    if threads is None and packaged:
        # One request's audio is encoded while others are written: each has half of the cores.
        rows_at_once = environment.cores()
        threads = max(1, rows_at_once // 2)
    elif threads is None:
        # Else a model that is loaded while another one encodes would keep that one's share of the threads.
        threads = environment.default_threads()
    return open_translator(
        path,
        threads=threads,
        device=settings.device if has_device else "auto",
        rows_at_once=rows_at_once,
        stop_loops=settings.stop_loops,
    )
