"""Which models a server takes, what it calls them, and what a failed load leaves behind."""

import asyncio
import json
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

from halve.errors import ArtefactError, InputError
from serve.models import OVERHEAD, find_models
from serve.registry import Registry
from serve.service import open_model
from serve.settings import ServeSettings
from tests import tiny
from tests.serve.conftest import eventually, serving, wav
from tests.serve.fakes import FakeTranslator


def make(directory: Path) -> str:
    """A package of a megabyte."""
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_bytes(bytes(1_000_000))
    (directory / "package.json").write_text(json.dumps({"languages": ["de"]}))
    return str(directory)


def test_a_path_that_is_no_directory_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = make(tmp_path / "good")
    (tmp_path / "file").touch()
    gone = (
        str(tmp_path / "gone"),
        "./gone",
        "../gone",
        "~/gone",
        "a/b/gone",
        "gone/",
        "gone",
        "file",
    )
    for given in gone:
        with pytest.raises(InputError, match="not a directory") as caught:
            find_models(ServeSettings(models=(good, given)))
        assert caught.value.exit_code == 2
    hub = ("some/one", "Qwen/Qwen2-Audio-7B-Instruct")
    assert list(find_models(ServeSettings(models=(good, *hub)))) == ["good", *hub]


def test_the_same_directory_is_given_twice_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "model")
    (tmp_path / "link").symlink_to(path)
    for again in (path, "model", "./model", "model/../model", "link"):
        with pytest.raises(InputError, match="twice"):
            find_models(ServeSettings(models=(path, again)))
    with pytest.raises(InputError, match="twice"):
        find_models(ServeSettings(models=("some/one", "some/one")))


def test_directories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    places = ("a/runs/model", "b/runs/model", "c/runs/model", "d/runs/model")
    paths = tuple(make(tmp_path / place) for place in places)
    models = find_models(ServeSettings(models=paths))
    assert list(models) == ["model", "runs-model", "runs-model-2", "runs-model-3"]
    assert tuple(model.path for model in models.values()) == paths


def test_a_load_that_fails_leaves_the_server_as_it_was(tmp_path: Path) -> None:
    opened: list[str] = []
    broken = {"bad"}

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        opened.append(Path(path).name)
        if opened[-1] in broken:
            raise ArtefactError(f"{path} is damaged")
        return FakeTranslator()

    paths = tuple(make(tmp_path / name) for name in ("good", "bad"))
    settings = ServeSettings(models=paths, memory_gb=0.002)
    with serving(settings, open_fake) as server:
        models = server.service.registry.models
        answer = server.post(wav(0.5), model="bad")
        assert answer.status_code == 503
        assert server.get("/ready").status_code == 200
        eventually(lambda: models["good"].engine is not None)
        assert opened == ["good", "bad", "good"]
        # Repeats do not push the good one out again.
        for _ in range(3):
            answer = server.post(wav(0.5), model="bad")
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 10
        assert opened == ["good", "bad", "good"]
        assert server.post(wav(0.5), model="good").status_code == 200
        # Later it is tried again, and may have been mended.
        models["bad"].retry_s, broken = 0.0, set()
        assert server.post(wav(0.5), model="bad").status_code == 200


def test_what_a_failed_load_held_is_gone_before_others_are_loaded_again(tmp_path: Path) -> None:
    held: list[weakref.ref[np.ndarray]] = []
    seen: list[bool] = []

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        if Path(path).name == "bad":
            weights = np.zeros(1_000_000)
            held.append(weakref.ref(weights))
            raise MemoryError("no room for the rest")
        seen.extend(each() is None for each in held)
        return FakeTranslator()

    paths = tuple(make(tmp_path / name) for name in ("good", "bad"))
    with serving(ServeSettings(models=paths, memory_gb=0.002), open_fake) as server:
        assert server.post(wav(0.5), model="bad").status_code == 503
        eventually(lambda: seen)
        assert seen == [True]


def test_a_server_that_stops_knows_of_the_model_that_is_leaving(tmp_path: Path) -> None:
    """Its thread cannot be interrupted: whoever ends the process must not unwind under it."""
    paths = tuple(make(tmp_path / name) for name in ("one", "two"))
    settings = ServeSettings(models=paths, memory_gb=0.002)

    async def run() -> tuple[bool, bool]:
        registry = Registry(settings, lambda path, settings: FakeTranslator())
        await registry.load_first()
        model = registry.models["one"]
        engine, begun, go = model.engine, threading.Event(), threading.Event()
        assert engine is not None
        stop = engine.close

        def slow(wait_s: float) -> bool:
            begun.set()
            return go.wait(wait_s) and stop(5)

        engine.close = slow  # type: ignore[method-assign]
        evicting = asyncio.create_task(registry._evict(model))
        await asyncio.to_thread(begun.wait, 10)
        early = await registry.close(0.1)
        go.set()
        await evicting
        return early, await registry.close(0.1)

    assert asyncio.run(run()) == (False, True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_whose_engine_has_ended_is_loaded_again(tmp_path: Path) -> None:
    opened: list[FakeTranslator] = []

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        opened.append(FakeTranslator())
        return opened[-1]

    def end(*_: object, **__: object) -> None:
        raise SystemExit

    with serving(ServeSettings(models=(make(tmp_path / "good"),)), open_fake) as server:
        opened[0].translate = end  # type: ignore[method-assign]
        assert server.post(wav(0.5), model="good").status_code == 503
        (model,) = server.service.registry.models.values()
        assert model.engine is not None
        assert model.engine.close(60)
        assert not model.is_loaded
        assert server.get("/v1/models").json()["data"][0]["loaded"] is False
        assert server.get("/ready").status_code == 200
        assert server.post(wav(0.5), model="good").status_code == 200
        assert len(opened) == 2 and model.is_loaded


def test_a_server_that_can_load_nothing_is_not_ready(tmp_path: Path) -> None:
    broken = {"bad"}

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        if Path(path).name in broken:
            raise ArtefactError(f"{path} is damaged")
        return FakeTranslator()

    paths = tuple(make(tmp_path / name) for name in ("good", "bad"))
    settings = ServeSettings(models=paths, memory_gb=0.002)
    with serving(settings, open_fake) as server:
        broken.add("good")
        for model in ("bad", "good"):
            assert server.post(wav(0.5), model=model).status_code == 503
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_cannot_be_looked_into_stop_no_server(tmp_path: Path, name: str) -> None:
    """Weights of another kind, or damaged ones: their bytes are counted twice, and loading has its say."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (model / name).write_bytes(bytes(1_000))
    (found,) = find_models(ServeSettings(models=(str(model),))).values()
    assert found.size_bytes == int(2_000 * OVERHEAD)


def test_a_model_of_the_hub_counts_once_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def download(name: str) -> None:
        place = tmp_path / f"models--some--{name}"
        make(place / "snapshots" / "0a1b")
        (place / "snapshots" / "0a1b" / "config.json").write_text("{}")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0a1b")

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        if path == "some/new":
            download("new")
        return FakeTranslator()

    download("known")
    settings = ServeSettings(models=("some/new", "some/known"), memory_gb=0.002)
    with serving(settings, open_fake) as server:
        models = server.service.registry.models
        assert [models[name].size_bytes for name in settings.models] == [1_200_000, 1_200_000]
        assert server.post(wav(0.5), model="some/known", to_language="de").status_code == 200
        assert models["some/new"].engine is None, "both are more than is allowed"


def test_a_package_made_anew_is_served_as_it_now_is(tmp_path: Path) -> None:
    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        return FakeTranslator()

    paths = tuple(make(tmp_path / name) for name in ("one", "two"))
    settings = ServeSettings(models=paths, memory_gb=0.002)
    with serving(settings, open_fake) as server:
        models = server.service.registry.models
        assert models["one"].languages == ("de",)
        (tmp_path / "one" / "package.json").write_text(json.dumps({"languages": ["zh"]}))
        assert server.post(wav(0.5), model="one", to_language="zh").status_code == 400, "loaded"
        assert server.post(wav(0.5), model="two").status_code == 200, "the first one is evicted"
        assert server.post(wav(0.5), model="one", to_language="zh").status_code == 200
        assert (models["one"].languages, models["one"].default_lang) == (("zh",), "zh")


def test_a_float32_package_counts_as_what_it_holds(tmp_path: Path) -> None:
    """Its weights lie in 16 bits where that loses nothing, and are wide once they are loaded."""
    sizes = []
    for bits, stored in ((32, 16.0), (32, 32.0), (4, 4.5)):
        path = tmp_path / f"package-{bits}-{stored}"
        path.mkdir()
        (path / "encoder.bin").write_bytes(bytes(1_000))
        (path / "decoder.bin").write_bytes(bytes(10_000))
        onnx = {"bits": {"encoder": bits, "decoder": bits}}
        onnx["bits_per_weight"] = {"encoder": stored, "decoder": stored}
        (path / "package.json").write_text(json.dumps({"onnx": onnx}))
        (found,) = find_models(ServeSettings(models=(str(path),))).values()
        sizes.append(found.size_bytes)
    assert sizes == [int(22_000 * OVERHEAD), int(11_000 * OVERHEAD), int(11_000 * OVERHEAD)]


def test_loops_are_cut_where_the_settings_ask_for_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halve.translate.is_looping", lambda tokens: True)
    for asked in (False, True):
        settings = ServeSettings(models=(str(tiny_model),), stop_loops=asked)
        translator = open_model(str(tiny_model), settings)
        found = translator.translate([tiny.tone(1.2, 1)], "de", limits=[4])[0]
        assert (found.stopped == "loop") is asked
        translator.close()
    with pytest.raises(ValueError, match="not for the engine plain"):
        ServeSettings(models=(str(tiny_model),), stop_loops=True, engine="plain")
