"""The models that a server knows: loaded when first asked for, evicted by least use."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from halve.environment import release_gpu_memory
from halve.errors import HalveError
from halve.translate import Translator
from serve.engine import Engine
from serve.errors import ApiError, unavailable
from serve.models import GIGABYTE, Model, describe, find_models
from serve.pieces import Watcher
from serve.settings import ServeSettings

log = logging.getLogger("halve.serve")

UNLOAD_WARN_S = 60
PATIENCE_S = 5.0
"""A model that waits so long for room takes that of a busy one, as soon as its requests are done."""
RETRY_S = 60.0
"""A model that could not be loaded makes no others leave for so long."""

OpenTranslator = Callable[[str, ServeSettings], Translator]


class Registry:
    """Loads, lends and evicts models. All methods run in the event loop."""

    def __init__(
        self,
        settings: ServeSettings,
        open_translator: OpenTranslator,
        watcher: Watcher | None = None,
    ) -> None:
        self.models = find_models(settings)
        self._settings = settings
        self._open = open_translator
        self._watcher = watcher or Watcher()
        self._room = asyncio.Condition()
        self._one_at_a_time = asyncio.Lock()
        self._opening: set[Engine] = set()
        self._leaving: set[Engine] = set()
        self._restoring: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether some model is loaded, or would be if a request came."""
        return any(model.can_work for model in self.models.values())

    def find(self, model_id: str) -> Model:
        """The model of an id.

        Raises:
            ApiError: there is none (404).
        """
        if model_id in self.models:
            model = self.models[model_id]
            if model.engine is not None and not model.is_loaded:
                log.error("%s: the engine has ended; the model is loaded again", model.id)
                model.engine = None
            if model.engine is None:
                self._look_again(model)
            return model
        raise ApiError(
            404,
            f"The model {model_id[:80]!r} does not exist here. "
            f"This server has: {', '.join(self.models)}.",
            param="model",
            code="model_not_found",
        )

    async def load_first(self) -> None:
        """Loads the first model.

        Raises:
            HalveError: it cannot be loaded.
        """
        await self._start(next(iter(self.models.values())))

    @asynccontextmanager
    async def borrow(self, model_id: str) -> AsyncIterator[tuple[Model, Engine]]:
        """A loaded model that is not evicted meanwhile.

        Raises:
            ApiError: unknown (404), or it cannot be loaded (503).
        """
        model = self.find(model_id)
        model.arriving += 1
        try:
            while model.is_leaving:
                await self._change(PATIENCE_S)
        finally:
            model.arriving -= 1
        model.users += 1
        try:
            if model.engine is None:
                if model.loading is None:
                    _check_retry(model)
                    model.loading = asyncio.create_task(self._load(model))
                    # Its failure counts as seen even if everyone who waited is gone.
                    model.loading.add_done_callback(
                        lambda task: task.cancelled() or task.exception()
                    )
                # The loading goes on for others when this request is given up.
                await asyncio.shield(model.loading)
            assert model.engine is not None
            yield model, model.engine
        finally:
            model.users -= 1
            model.used_s = time.monotonic()
            await self._changed()

    async def _changed(self) -> None:
        async with self._room:
            self._room.notify_all()

    async def _change(self, most_s: float) -> None:
        """Waits until something may have changed, or so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s), self._room:
                await self._room.wait()

    async def _load(self, model: Model) -> None:
        evicted: list[Model] = []
        try:
            async with self._one_at_a_time:
                if model.engine is None:
                    await self._make_room(model, evicted)
                    await self._start(model)
        except _NobodyWaitsError:
            self._restoring = asyncio.create_task(self._restore(evicted))
            raise unavailable(
                f"The model {model.id} was not loaded: nobody waited for it."
            ) from None
        except Exception as error:
            if isinstance(error, HalveError):
                log.error("%s: cannot be loaded: %s", model.id, error)
            else:
                log.exception("%s: cannot be loaded", model.id)
            model.retry_s = time.monotonic() + RETRY_S
            await asyncio.to_thread(_return_memory)
            if evicted:
                self._restoring = asyncio.create_task(self._restore(evicted))
            raise unavailable(f"The model {model.id} cannot be loaded.") from None
        finally:
            model.loading = None

    async def _restore(self, evicted: list[Model]) -> None:
        """Loads again what made room in vain, the last used first, as far as there is room now."""
        for model in reversed(evicted):
            async with self._one_at_a_time:
                if model.engine is None and self._fits(model):
                    try:
                        await self._start(model)
                    except Exception:
                        log.exception("%s: cannot be loaded again", model.id)

    async def _start(self, model: Model) -> None:
        engine = Engine(
            model.id,
            lambda: self._open(model.path, self._settings),
            batch_size=1 if self._settings.engine == "plain" else self._settings.batch_size,
            reserve=self._settings.reserve,
            watcher=self._watcher,
        )
        self._opening.add(engine)
        engine.ready.add_done_callback(lambda _: self._opening.discard(engine))
        # Who stops waiting must not cancel the future that the engine's thread will resolve.
        translator = await asyncio.shield(asyncio.wrap_future(engine.ready))
        self._look_again(model)  # a hub id's weights are on this machine only now
        model.languages = model.languages or tuple(translator.languages)
        if model.default_lang is None and len(translator.languages) == 1:
            model.default_lang = translator.languages[0]
        model.max_audio_s = translator.max_audio_s
        model.engine = engine
        log.info("%s: loaded", model.id)

    def _look_again(self, model: Model) -> None:
        """A package may have been made anew in its place since it was looked at."""
        with contextlib.suppress(HalveError, OSError):  # loading it tells what is wrong
            now = describe(model.id, model.path, self._settings)
            model.size_bytes = now.size_bytes or model.size_bytes
            if now.languages:
                model.languages, model.default_lang = now.languages, now.default_lang

    async def _make_room(self, wanted: Model, evicted: list[Model]) -> None:
        """Unloads what is in the way, and adds it to `evicted`.

        Raises:
            _NobodyWaitsError: those who wanted the model have left.
        """
        if self._settings.memory_gb is None:
            return
        patient_until_s = time.monotonic() + PATIENCE_S
        try:
            while not self._fits(wanted):
                if not wanted.users:
                    raise _NobodyWaitsError
                loaded = [m for m in self.models.values() if m.engine is not None]
                idle = [m for m in loaded if not m.users]
                if idle:
                    evicted.append(min(idle, key=lambda m: m.used_s))
                    await self._evict(evicted[-1])
                    continue
                left_s = patient_until_s - time.monotonic()
                if left_s <= 0:
                    # All are in use without a break: one takes no more until it is evicted.
                    leaving = min(loaded, key=lambda m: (not m.is_leaving, m.used_s))
                    leaving.is_leaving, left_s = True, PATIENCE_S
                await self._change(left_s)
        finally:
            for model in self.models.values():
                model.is_leaving = False
            await self._changed()

    def _fits(self, wanted: Model) -> bool:
        taken = sum(m.size_bytes for m in self.models.values() if m.engine is not None)
        budget = (self._settings.memory_gb or 0) * GIGABYTE
        return not taken or taken + wanted.size_bytes <= budget

    async def _evict(self, model: Model) -> None:
        engine, model.engine = model.engine, None
        if engine is not None:
            self._leaving.add(engine)
            waited_s = 0
            # Its memory is not free before its last translation is over. In short waits: a server that stops does not outlast one.
            while not await asyncio.to_thread(engine.close, 1.0):
                waited_s += 1
                if waited_s % UNLOAD_WARN_S == 0:
                    log.warning("%s: waiting for a translation that nobody wants", model.id)
            self._leaving.discard(engine)
            await asyncio.to_thread(_return_memory)
            log.info("%s: unloaded", model.id)

    async def close(self, wait_s: float) -> bool:
        """Unloads everything; False if an engine is still loading, leaving or in a translation."""
        engines = [m.engine for m in self.models.values() if m.engine is not None]
        for model in self.models.values():
            model.engine = None
        closing = [asyncio.to_thread(engine.close, wait_s) for engine in engines]
        stopped = all(await asyncio.gather(*closing))
        return stopped and not self._opening and not self._leaving


class _NobodyWaitsError(Exception):
    """There is no one left to load a model for."""


def _check_retry(model: Model) -> None:
    """Refuses a model that could not be loaded a moment ago."""
    left_s = model.retry_s - time.monotonic()
    if left_s > 0:
        raise unavailable(
            f"The model {model.id} could not be loaded a moment ago.",
            retry_after_s=math.ceil(left_s),
        )


def _return_memory() -> None:
    """Gives freed memory back to the system, where the C library can."""
    gc.collect()
    release_gpu_memory()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
