"""The models that a server was given: where they are, what they speak, what memory they will take."""

import asyncio
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halve.arithmetic import roomy_dtype
from halve.environment import quick_dtype
from halve.errors import HalveError, InputError
from halve.languages import LANGUAGES
from halve.models import local_model, pick_device
from halve.shards import half_bytes, spare_weights
from serve.engine import Engine
from serve.errors import ApiError, bad_field
from serve.settings import ServeSettings

GIGABYTE = 1_000_000_000
WEIGHTS = (".safetensors", ".onnx", ".data", ".gguf", ".bin", ".npy")
OVERHEAD = 1.2
"""A loaded model takes about this much more than its weights."""
CACHE_POSITIONS = 512
"""Positions of prompt, audio and text that a batch makes room for at first."""
LONGEST_POSITIONS = 1280
"""The same for 30 s of audio, at 25 positions a second, a prompt and the longest translation of it."""


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
    def is_loaded(self) -> bool:
        """Whether an engine takes its requests on."""
        return self.engine is not None and self.engine.is_alive

    @property
    def can_work(self) -> bool:
        """Whether it is loaded, or would be if a request came."""
        return self.is_loaded or time.monotonic() >= self.retry_s

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
        models[name] = describe(name, given, settings)
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
    """Whether it cannot be a hub id, which is OWNER/NAME."""
    is_marked = given.startswith(("/", "./", "../", "~")) or given.endswith("/")
    return is_marked or given.count("/") != 1 or Path(given).exists()


def _free_name(place: str, taken: dict[str, Model]) -> str:
    """A model's id: its directory's name, with the parent's or a number too if others have it."""
    path = Path(place)
    if not path.is_absolute():
        short = long = place
    else:
        short, long = path.name, f"{path.parent.name}-{path.name}"
    numbered = (f"{long}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain((short, long), numbered) if name not in taken)


def describe(name: str, given: str, settings: ServeSettings) -> Model:
    """What a model's files say now. `given`: as it was given to --model."""
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
    # 16-bit models are computed in 32 bits if there is room; packages where the processor has no units for 16.
    try:
        half = half_bytes(path)
    except HalveError:  # weights of another kind, or damage that loading will name
        half = stored
    is_package = (path / "package.json").is_file()
    computed = quick_dtype(pick_device(device), half) if is_package else roomy_dtype(path, device)
    return int((stored + (half if computed == "float32" else 0)) * OVERHEAD)


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
    """Keys and values of a full batch of a package."""
    facts = _read_json(path / "package.json").get("onnx")
    geometry = facts.get("decoder", {}) if isinstance(facts, dict) else {}
    sizes = [geometry.get(key, 0) for key in ("layers", "kv_heads", "head_dim")]
    stored = facts.get("bits") if isinstance(facts, dict) else None
    bits = stored.get("cache", 32) if isinstance(stored, dict) else 32
    if not all(isinstance(size, int) for size in [*sizes, bits]):
        return 0
    positions = LONGEST_POSITIONS if settings.reserve else CACHE_POSITIONS
    return int(2 * bits // 8 * settings.batch_size * positions * math.prod(sizes))
