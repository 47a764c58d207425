"""Refusals: in OpenAI's shape, without a word about the server's insides, and leaving nothing."""

import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from halve.errors import ArtefactError, InputError
from serve.models import find_models
from serve.service import Service
from serve.settings import ServeSettings
from tests.serve.conftest import HTTP, eventually, serving, wav
from tests.serve.fakes import FakeTranslator

# The client marks its own audio translations as deprecated; its users still have them.
pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")


def refused(response: httpx.Response, status: int, code: str | None = None) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert "/tmp" not in response.text
    if code:
        assert error["code"] == code
    return error


def test_blank_fields_are_as_good_as_absent(serve_fake) -> None:
    """Tools send what their user left empty."""
    names = ("to_language", "prompt", "temperature", "response_format", "stream", "odd")
    with serve_fake() as server:
        answer = server.post(wav(0.5), **dict.fromkeys(names, ""), language=" ")
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"text": "de 0.50"}
        assert "x-halve-ignored" not in answer.headers
        assert refused(server.post(wav(0.5), model=""), 400)["param"] == "model"


def test_fields(serve_fake) -> None:
    with serve_fake() as server:
        audio = wav(0.5)
        refused(server.post(audio, model="gpt-5"), 404, "model_not_found")
        refused(server.post(audio, to_language="fr"), 400, "unsupported_language")
        assert "0" in refused(server.post(audio, temperature=0.7), 400)["message"]
        refused(server.post(audio, temperature="hot"), 400)
        refused(server.post(audio, response_format="docx"), 400)
        refused(server.post(audio, response_format="srt", stream="true"), 400)
        refused(server.post(None), 400)
        refused(server.post(b"not audio"), 422, "invalid_audio")
        refused(server.post(b""), 422)
        refused(server.get("/v1/nothing"), 404)
        refused(server.get("/v1/models/nothing"), 404, "model_not_found")
        refused(server.get("/v1/audio/translations"), 405)
        url = f"{server.url}/v1/audio/translations"
        refused(HTTP.post(url, json={"model": "fake"}), 400, "bad_form")
        header = {"content-type": "multipart/form-data; boundary=x"}
        refused(HTTP.post(url, content=b"--x\r\nbroken", headers=header), 400)
        refused(HTTP.post(url, content=b"--x\r\nA: b\r\n\r\n\r\n--x--\r\n", headers=header), 400)
        two = [("file", ("a", audio)), ("file", ("b", audio))]
        refused(HTTP.post(url, data={"model": "fake"}, files=two), 400)
        assert server.post(audio, to_language="zh-CN").json() == {"text": "zh 0.50"}
        assert server.post(audio, to_language="German").json() == {"text": "de 0.50"}
        eventually(server.nothing_left)


def test_what_has_no_effect_is_named(serve_fake) -> None:
    with serve_fake() as server:
        answer = server.post(wav(0.5), prompt="Be brief.", language="en", **{"a b": "c"})
        assert answer.headers["x-halve-ignored"] == "language,prompt"


def test_chat_fields(serve_fake) -> None:
    with serve_fake() as server:
        url = f"{server.url}/v1/chat/completions"
        part = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
        text = {"type": "text", "text": "Translate."}

        def ask(content: object, **fields: object) -> httpx.Response:
            message = {"role": "user", "content": content}
            return HTTP.post(url, json={"model": "fake", "messages": [message], **fields})

        refused(ask("hello"), 400)
        refused(ask([text]), 400)
        refused(ask([part, part]), 400)
        refused(ask([part]), 422, "invalid_audio")
        refused(ask([part], temperature=1), 400)
        refused(ask([part], n=2), 400)
        refused(ask([part], modalities=["audio"]), 400)
        refused(ask([part], response_format={"type": "json_object"}), 400)
        refused(ask([{**part, "input_audio": {"data": "%%"}}]), 400)
        refused(ask([{**part, "input_audio": {"data": ""}}]), 400)
        refused(ask([part, {**text, "text": "Translate into French."}]), 400)
        refused(HTTP.post(url, content=b"{" * 100_000), 400)
        refused(HTTP.post(url, content=b"[1"), 400)
        eventually(server.nothing_left)


def test_sizes_and_lengths(serve_fake) -> None:
    with serve_fake(max_upload_bytes=100_000, max_audio_s=2.0) as server:
        refused(server.post(wav(60.0)), 413, "request_too_large")
        refused(server.post(wav(2.5)), 422, "audio_too_long")
        assert server.post(wav(1.9)).status_code == 200

        def unannounced():
            yield b"--x\r\n" + b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            for _ in range(40):
                yield bytes(10_000)

        header = {"content-type": "multipart/form-data; boundary=x"}
        url = f"{server.url}/v1/audio/translations"
        refused(HTTP.post(url, content=unannounced(), headers=header), 413)
        refused(server.post(wav(1.0), prompt="x" * 70_000), 400)
        eventually(server.nothing_left)


def test_full_queue_and_full_server(serve_fake, fake: FakeTranslator) -> None:
    fake.gate.clear()
    with serve_fake(max_queue=2, max_concurrent=3) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.post, wav(0.5)) for _ in range(2)]
        eventually(lambda: server.service.registry.models["fake"].users == 2)
        answer = server.post(wav(0.5))
        refused(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) > 0
        server.service.running += 1
        refused(server.post(wav(0.5)), 429, "queue_full")
        server.service.running -= 1
        fake.gate.set()
        assert all(answer.result().status_code == 200 for answer in answers)
        eventually(server.nothing_left)


def test_the_queue_is_full_while_a_model_makes_room(
    serve_fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.registry.PATIENCE_S", 0.05)
    with serve_fake(max_queue=2) as server, ThreadPoolExecutor(4) as pool:
        model = server.service.registry.models["fake"]
        model.is_leaving = True
        try:
            answers = [pool.submit(server.post, wav(0.5)) for _ in range(2)]
            eventually(lambda: model.taken_on == 2)
            refused(server.post(wav(0.5)), 429, "queue_full")
            assert model.users == 0
        finally:
            model.is_leaving = False
        assert all(answer.result().status_code == 200 for answer in answers)
        eventually(server.nothing_left)
        assert model.taken_on == 0


def test_too_slow(serve_fake, fake: FakeTranslator) -> None:
    fake.gate.clear()
    with serve_fake(request_timeout_s=0.5) as server:
        answer = server.post(wav(0.5))
        refused(answer, 504, "timeout")
        assert answer.headers["x-should-retry"] == "false", "OpenAI's client would ask thrice"
        refused(server.post(wav(0.5), stream="true"), 504, "timeout")
        fake.gate.set()
        eventually(server.nothing_left)
        # The second never began.
        assert len(fake.batches) == 1


def test_failures_say_nothing_of_the_inside(serve_fake, fake: FakeTranslator) -> None:
    fake.fail_at_s = 0.5
    with serve_fake() as server:
        answer = server.post(wav(0.5))
        assert "/secret" not in answer.text
        refused(answer, 500, "internal_error")
        assert server.post(wav(0.6)).status_code == 200
        with pytest.raises(openai.InternalServerError):
            server.client().audio.translations.create(model="fake", file=("a.wav", wav(0.5)))


def test_a_client_that_leaves_costs_nothing(serve_fake, fake: FakeTranslator) -> None:
    fake.gate.clear()
    with serve_fake() as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, wav(0.5))
        assert fake.entered.wait(60)
        for stream in ("false", "true"):
            request = httpx.Request(
                "POST",
                f"{server.url}/v1/audio/translations",
                data={"model": "fake", "stream": stream},
                files={"file": ("a.wav", wav(0.7))},
            )
            port = int(server.url.rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
                body = request.read()
                start = "POST /v1/audio/translations HTTP/1.1\r\n"
                connection.sendall(f"{start}{head}\r\n".encode() + body)
                eventually(lambda: server.service.running == 2)
            eventually(lambda: server.service.running == 1)
        fake.gate.set()
        assert first.result().status_code == 200
        eventually(server.nothing_left)
        assert fake.batches == [[0.5]]


def test_keys(serve_fake, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("a-secret-key\n")
    with serve_fake(api_key_file=key) as server:
        assert '"fake"' not in server.get("/openapi.json").text, "names need the key"
        refused(server.post(wav(0.5)), 401, "invalid_api_key")
        for wrong in ("Bearer wrong", "Bearer", "a-secret-key", "Basic a-secret-key", "Bearer ü"):
            header = {"authorization": wrong.encode("utf8")}
            refused(server.post(wav(0.5), headers=header), 401)
        refused(server.get("/metrics"), 401)
        assert server.get("/health").status_code == 200
        assert server.get("/").status_code == 200
        client = server.client(api_key="a-secret-key")
        text = client.audio.translations.create(model="fake", file=("a.wav", wav(0.5))).text
        assert text == "de 0.50"
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="other").models.list()


def test_pages_elsewhere_may_not_use_a_local_server(serve_fake) -> None:
    with serve_fake() as server:
        refused(server.get("/v1/models", headers={"host": "evil.example"}), 403, "unknown_host")
        elsewhere = {"origin": "https://evil.example"}
        refused(server.post(wav(0.5), headers=elsewhere), 403, "unknown_origin")
        assert server.post(wav(0.5), headers={"origin": server.url}).status_code == 200
        answer = server.get("/v1/models", headers=elsewhere)
        assert "access-control-allow-origin" not in answer.headers


def test_origins_that_are_let_in(serve_fake) -> None:
    page = "https://page.example"
    with serve_fake(allow_origins=(page,), allow_hosts=("proxy.example",)) as server:
        answer = server.post(wav(0.5), headers={"origin": page, "host": "proxy.example"})
        assert answer.headers["access-control-allow-origin"] == page


def test_public_addresses_need_a_key_or_a_flag(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        settings = ServeSettings(models=("x",), host=host)
        with pytest.raises(InputError, match="allow-public"):
            settings.check_exposure()
        assert ServeSettings(models=("x",), host=host, allow_public=True).check_exposure()
        keyed = ServeSettings(models=("x",), host=host, api_key_file=tmp_path / "key")
        assert keyed.check_exposure() is None
        with pytest.raises(InputError):
            keyed.read_api_key()
    for host in ("127.0.0.1", "localhost", "::1"):
        assert ServeSettings(models=("x",), host=host).check_exposure() is None


def test_models_are_loaded_when_asked_for_and_evicted_by_least_use(tmp_path: Path) -> None:
    opened: list[str] = []
    translators: dict[str, FakeTranslator] = {}
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(bytes(1_000_000))
        (tmp_path / name / "package.json").write_text(json.dumps({"languages": ["de"]}))

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        name = Path(path).name
        opened.append(name)
        if name == "c":
            raise ArtefactError(f"{path} is damaged")
        translators[name] = FakeTranslator()
        return translators[name]

    models = tuple(str(tmp_path / name) for name in "abc")
    settings = ServeSettings(models=models, memory_gb=0.002)
    with serving(settings, open_fake) as server:
        assert opened == ["a"]
        assert [m["loaded"] for m in server.get("/v1/models").json()["data"]] == [
            True,
            False,
            False,
        ]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: server.post(wav(0.5), model="b"), range(3)))
        assert all(answer.status_code == 200 for answer in answers)
        assert opened == ["a", "b"]
        assert translators["a"].closed
        refused(server.post(wav(0.5), model="c"), 503, "model_unavailable")
        assert server.post(wav(0.5), model="a").status_code == 200
        assert opened == ["a", "b", "c", "b", "a"]  # b gave way to c, which could not be loaded
    with pytest.raises(InputError, match="memory"):
        Service(ServeSettings(models=models, memory_gb=0.001))
    with pytest.raises(InputError, match="twice"):
        Service(ServeSettings(models=(models[0],) * 3))


def test_a_model_in_constant_use_makes_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.registry.PATIENCE_S", 0.2)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(bytes(1_000_000))
        (tmp_path / name / "package.json").write_text(json.dumps({"languages": ["de"]}))
    settings = ServeSettings(models=(str(tmp_path / "a"), str(tmp_path / "b")), memory_gb=0.002)
    with serving(settings, lambda *_: FakeTranslator()) as server, ThreadPoolExecutor(3) as pool:
        models = server.service.registry.models
        enough = threading.Event()

        def use(model: str) -> set[int]:
            found = set()
            while not enough.is_set():
                found.add(server.post(wav(0.5), model=model).status_code)
            return found

        # Several clients at once, so that a has a request at every moment.
        busy = [pool.submit(use, "a") for _ in range(2)]
        eventually(lambda: models["a"].users > 0)
        answers = [server.post(wav(0.5), model="b").status_code for _ in range(2)]
        eventually(lambda: models["a"].engine is not None)
        enough.set()
        assert answers == [200, 200]
        assert all(client.result() == {200} for client in busy)
        assert not any(model.is_leaving for model in models.values())


def test_a_model_that_nobody_waits_for_pushes_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.registry.PATIENCE_S", 0.2)
    opened: list[str] = []
    busy = FakeTranslator()

    def open_fake(path: str, settings: ServeSettings) -> FakeTranslator:
        opened.append(Path(path).name)
        return busy

    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(bytes(1_000_000))
        (tmp_path / name / "package.json").write_text(json.dumps({"languages": ["de"]}))
    settings = ServeSettings(models=(str(tmp_path / "a"), str(tmp_path / "b")), memory_gb=0.002)
    with serving(settings, open_fake) as server, ThreadPoolExecutor(2) as pool:
        models = server.service.registry.models
        busy.gate.clear()
        running = pool.submit(server.post, wav(0.5), model="a")
        assert busy.entered.wait(60)
        with pytest.raises(httpx.ReadTimeout):
            leave(server, model="b")
        eventually(lambda: models["b"].loading is None)
        assert models["a"].engine is not None and not models["a"].is_leaving
        busy.gate.set()
        assert running.result().status_code == 200
        assert server.post(wav(0.5), model="a").status_code == 200
        assert opened == ["a"], "b was wanted by nobody any more"
        assert server.post(wav(0.5), model="b").status_code == 200, "and can be had at once"


def leave(server: Any, model: str) -> None:
    """A client that gives up after a second."""
    files, data = {"file": ("a.wav", wav(0.5))}, {"model": model}
    httpx.post(f"{server.url}/v1/audio/translations", files=files, data=data, timeout=1.0)


def test_large_chat_bodies_have_a_bound_together(serve_fake) -> None:
    with serve_fake() as server:
        room = server.service.body_room
        room.take(room._most - 1_000)
        body = json.dumps({"model": "fake", "messages": [], "x": "y" * 2_000})
        url = f"{server.url}/v1/chat/completions"
        refused(HTTP.post(url, content=body), 429, "queue_full")
        room.give_back(room._most - 1_000)
        refused(HTTP.post(url, content=body), 400)
        eventually(lambda: room.taken_bytes == 0)


def test_an_onnx_package_counts_its_batch_cache(tmp_path: Path) -> None:
    geometry = {"layers": 10, "kv_heads": 2, "head_dim": 64}
    (tmp_path / "package.json").write_text(json.dumps({"onnx": {"decoder": geometry}}))
    settings = {"models": (str(tmp_path),)}
    sizes = [
        find_models(ServeSettings(**settings, batch_size=size))[tmp_path.name].size_bytes
        for size in (1, 16)
    ]
    assert sizes == [2 * 4 * 512 * 10 * 2 * 64 * size for size in (1, 16)]
    facts = {"onnx": {"decoder": geometry, "bits": {"cache": 8}}}
    (tmp_path / "package.json").write_text(json.dumps(facts))
    found = find_models(ServeSettings(**settings, batch_size=16))[tmp_path.name]
    assert found.size_bytes == sizes[1] / 4


def test_counters(serve_fake) -> None:
    with serve_fake() as server:
        server.post(wav(0.5))
        server.post(b"nothing")
        text = server.get("/metrics").text
    for line in (
        'halve_requests_total{endpoint="/v1/audio/translations",status="200"} 1.0',
        'halve_requests_total{endpoint="/v1/audio/translations",status="422"} 1.0',
        'halve_audio_seconds_total{model="fake"} 0.5',
        'halve_tokens_total{model="fake"} 3.0',
        'halve_batch_size_count{model="fake"} 1.0',
        'halve_model_loaded{model="fake"} 1.0',
        "halve_requests_running 0.0",
        "halve_first_token_seconds_count",
        "halve_rtf_count",
        "process_resident_memory_bytes",
    ):
        assert line in text


def test_uploads_lie_in_a_private_directory(serve_fake, fake: FakeTranslator) -> None:
    fake.gate.clear()
    with serve_fake() as server:
        thread = threading.Thread(target=server.post, args=(wav(20.0),))
        thread.start()
        assert fake.entered.wait(60)
        directory = server.service.directory
        assert directory.stat().st_mode & 0o777 == 0o700
        # Its file has no name, so that nothing could leave it behind.
        assert not list(directory.iterdir())
        fake.gate.set()
        thread.join(20)
    assert not directory.exists()


def test_a_file_object_of_the_client(serve_fake) -> None:
    with serve_fake() as server:
        file = io.BytesIO(wav(0.5))
        file.name = "audio.wav"
        assert server.client().audio.translations.create(model="fake", file=file).text == "de 0.50"
