"""The models that a server knows: loaded when first asked for, evicted by least use."""

import asyncio
import contextlib
import ctypes
import gc
import itertools
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.environment import quick_dtype, release_gpu_memory
from halve.errors import HalveError, InputError
from halve.languages import LANGUAGES
from halve.models import local_model, pick_device
from halve.shards import half_bytes, spare_weights
from halve.translate import Translator
from serve.engine import Engine
from serve.errors import ApiError, bad_field, unavailable
from serve.pieces import Watcher
from serve.settings import ServeSettings

log = logging.getLogger("halve.serve")

GIGABYTE = 1_000_000_000
WEIGHTS = (".safetensors", ".onnx", ".data", ".gguf", ".bin", ".npy")
OVERHEAD = 1.2
"""A loaded model takes about this much more than its weights."""
CACHE_POSITIONS = 512
"""Positions of prompt, audio and text that a batch makes room for at first."""
LONGEST_POSITIONS = 1024
"""The same for 30 s of audio, at 25 positions a second."""
UNLOAD_WAIT_S = 60.0
PATIENCE_S = 5.0
"""A model that waits so long for room takes that of a busy one, as soon as its requests are done."""
RETRY_S = 60.0
"""A model that could not be loaded makes no others leave for so long."""

OpenTranslator = Callable[[str, ServeSettings], Translator]


@dataclass(eq=False)
class Model:
    """One --model: where it is, and its engine while it is loaded."""

    id: str
    path: str
    size_bytes: int
    """Estimate of the memory it takes when loaded."""
    default_lang: str | None
    """None where its files do not say; requests must then."""
    languages: tuple[str, ...] | None = None
    max_audio_s: float | None = None
    created_s: int = 0
    engine: Engine | None = None
    loading: "asyncio.Task[None] | None" = None
    users: int = 0
    """Requests that hold it now: it is not evicted under them."""
    arriving: int = 0
    """Requests that wait for its return while it makes room for another model."""
    is_leaving: bool = False
    """Takes no new requests until it has made room for another model."""
    used_s: float = 0.0
    retry_s: float = 0.0
    """After a load that failed: when it may be tried again, on the monotonic clock."""

    @property
    def taken_on(self) -> int:
        """Requests that it has or will have."""
        return self.users + self.arriving

    @property
    def can_work(self) -> bool:
        """Whether it is loaded, or would be if a request came."""
        return self.engine is not None or time.monotonic() >= self.retry_s

    def choose_language(self, asked: str | None) -> str:
        """The language to translate into, which the model must know.

        Raises:
            ApiError: it does not, or none was asked for and there is no default.
        """
        known = self.languages or ()
        if asked is None:
            if self.default_lang is None:
                raise bad_field("to_language", f"Say which language: {_listed(known)}.")
            return self.default_lang
        code = asked.strip().lower().replace("_", "-").split("-")[0]
        by_name = {language.name.lower(): language.code for language in LANGUAGES.values()}
        code = by_name.get(code, code)
        if code not in known:
            raise ApiError(
                400,
                f"The model {self.id} does not translate into {asked[:20]!r}. "
                f"It translates into: {_listed(known)}.",
                param="to_language",
                code="unsupported_language",
            )
        return code


def _listed(codes: tuple[str, ...]) -> str:
    return ", ".join(codes) or "none"


def find_models(settings: ServeSettings) -> dict[str, Model]:
    """The models of the settings by id, in their order; nothing is loaded.

    Raises:
        InputError: a model is given twice, is a path to no directory, or cannot fit into the memory
            allowed.
    """
    models: dict[str, Model] = {}
    places: set[str] = set()
    for given in settings.models:
        path = Path(given)
        if not path.is_dir() and _looks_like_path(given):
            raise InputError(
                f"The model {given} is not a directory",
                expected="the directory of a package, a student or a teacher, or a hub id",
            )
        place = str(path.resolve()) if path.is_dir() else given
        if place in places:
            raise InputError(f"The model {given} is given twice", mend="give each model once")
        places.add(place)
        name = _free_name(place, models)
        models[name] = _describe(name, given, settings)
    if settings.memory_gb is not None:
        for model in models.values():
            if model.size_bytes > settings.memory_gb * GIGABYTE:
                raise InputError(
                    f"The model {model.id} takes about {model.size_bytes / GIGABYTE:.2f} GB of "
                    f"memory and --memory-gb allows {settings.memory_gb:g}",
                    mend="allow more, or serve a smaller package",
                )
    return models


def _looks_like_path(given: str) -> bool:
    """Whether it cannot be a hub id, which is a name or OWNER/NAME."""
    is_marked = given.startswith(("/", "./", "../", "~")) or given.endswith("/")
    return is_marked or given.count("/") > 1 or Path(given).exists()


def _free_name(place: str, taken: dict[str, Model]) -> str:
    """A model's id: its directory's name, with the parent's or a number too if others have it."""
    path = Path(place)
    if not path.is_absolute():
        short = long = place
    else:
        short, long = path.name, f"{path.parent.name}-{path.name}"
    numbered = (f"{long}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain((short, long), numbered) if name not in taken)


def _describe(name: str, given: str, settings: ServeSettings) -> Model:
    path = local_model(given)
    if path is None:  # the hub has it, and its size is known once it is here
        return Model(name, given, 0, None, created_s=int(time.time()))
    languages = _languages(path)
    return Model(
        name,
        given,
        _size_bytes(path, settings.device) + _cache_bytes(path, settings),
        languages[0] if languages else None,
        languages=languages or None,
        created_s=int(path.stat().st_mtime),
    )


def _languages(path: Path) -> tuple[str, ...]:
    """Languages that a package or an artefact says it was made for; empty where it does not say."""
    record = _read_json(path / "artefact.json")
    sources = (_read_json(path / "package.json"), record.get("recipe"), record.get("extra"))
    for facts in (each for each in sources if isinstance(each, dict)):
        for key in ("languages", "langs", "lang"):
            found = facts.get(key) or ()
            codes = [found] if isinstance(found, str) else found
            known = tuple(code for code in codes if code in LANGUAGES)
            if known:
                return known
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _size_bytes(path: Path, device: str) -> int:
    try:
        spare = {path / name for name in spare_weights(path)}
    except HalveError:  # damage that loading will name
        spare = set()
    weights = (f for f in path.rglob("*") if f.suffix in WEIGHTS and f not in spare)
    stored = sum(f.stat().st_size for f in weights) + _widened_bytes(path)
    config = _read_json(path / "config.json")
    is_half = str(config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16")
    if not is_half:
        return int(stored * OVERHEAD)
    # 16-bit models are computed in 32 bits; packages where the processor has no units for 16.
    try:
        half = half_bytes(path)
    except HalveError:  # weights of another kind, or damage that loading will name
        half = stored
    is_package = (path / "package.json").is_file()
    widened = not is_package or quick_dtype(pick_device(device), half) == "float32"
    return int((stored + (half if widened else 0)) * OVERHEAD)


def _widened_bytes(path: Path) -> int:
    """What a package's float32 graphs take more than they store: weights that fit into 16 bits are stored in them."""
    facts = _read_json(path / "package.json").get("onnx")
    facts = facts if isinstance(facts, dict) else {}
    computed, stored = facts.get("bits"), facts.get("bits_per_weight")
    if not isinstance(computed, dict) or not isinstance(stored, dict):
        return 0
    widened = [
        path / f"{part}.bin"
        for part in ("encoder", "decoder")
        if computed.get(part) == 32 and stored.get(part) == 16
    ]
    return sum(file.stat().st_size for file in widened if file.is_file())


def _cache_bytes(path: Path, settings: ServeSettings) -> int:
    """Keys and values of a full batch, which a package keeps in 32 bits."""
    facts = _read_json(path / "package.json").get("onnx")
    geometry = facts.get("decoder", {}) if isinstance(facts, dict) else {}
    sizes = [geometry.get(key, 0) for key in ("layers", "kv_heads", "head_dim")]
    if not all(isinstance(size, int) for size in sizes):
        return 0
    positions = LONGEST_POSITIONS if settings.reserve else CACHE_POSITIONS
    return int(2 * 4 * settings.batch_size * positions * math.prod(sizes))


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
            now = _describe(model.id, model.path, self._settings)
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
            await asyncio.to_thread(engine.close, UNLOAD_WAIT_S)
            await asyncio.to_thread(_return_memory)
            log.info("%s: unloaded", model.id)

    async def close(self, wait_s: float) -> bool:
        """Unloads everything; False if an engine is still loading or in a translation."""
        engines = [m.engine for m in self.models.values() if m.engine is not None]
        for model in self.models.values():
            model.engine = None
        closing = [asyncio.to_thread(engine.close, wait_s) for engine in engines]
        return all(await asyncio.gather(*closing)) and not self._opening


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
