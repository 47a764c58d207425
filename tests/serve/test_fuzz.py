"""Whatever is sent, the answer is a success or a refusal in OpenAI's shape."""

import json
import string
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.settings import ServeSettings
from tests.serve.conftest import HTTP, Running, eventually, serving, wav
from tests.serve.fakes import FakeTranslator

QUICK = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = tmp_path_factory.mktemp("models") / "fake"
    model.mkdir()
    (model / "package.json").write_text('{"languages": ["de"]}')
    with serving(ServeSettings(models=(str(model),)), lambda *_: FakeTranslator()) as running:
        yield running
        eventually(running.nothing_left)


def check(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def either(*good: object) -> st.SearchStrategy:
    """Often something that is right, else any text."""
    return st.sampled_from(good) | st.text(max_size=30)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "model": either("fake"),
        "to_language": either("de", "", "DE-at"),
        "prompt": st.text(max_size=50),
        "temperature": either("0", "0.0", "1e999", "nan"),
        "response_format": either("json", "text", "srt", "vtt", "verbose_json"),
        "stream": either("true", "false", "1"),
    },
)


@QUICK
@given(FIELDS, st.none() | st.binary(max_size=200) | st.just(wav(0.2)))
def test_forms(server: Running, fields: dict[str, str], audio: bytes | None) -> None:
    files = {} if audio is None else {"file": ("a.wav", audio)}
    url = f"{server.url}/v1/audio/translations"
    check(HTTP.post(url, data=fields, files=files or {"x": b"y"}))


@QUICK
@given(st.binary(max_size=400), st.text(string.ascii_letters + "'-=\";", max_size=30))
def test_bodies_that_are_no_forms(server: Running, body: bytes, boundary: str) -> None:
    url = f"{server.url}/v1/audio/translations"
    head = f"--{boundary}\r\nContent-Disposition: form-data; name=file; filename=x\r\n\r\n"
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    check(HTTP.post(url, content=head.encode() + body, headers=kind))
    check(HTTP.post(url, content=body, headers=kind))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
PART = st.fixed_dictionaries(
    {"type": either("text", "input_audio")},
    optional={"text": JSON, "input_audio": st.fixed_dictionaries({"data": either("UklGRg==")})},
)
MESSAGE = st.fixed_dictionaries(
    {"role": either("user", "system")}, optional={"content": JSON | st.lists(PART, max_size=3)}
)
CHAT = st.fixed_dictionaries(
    {},
    optional={
        "model": either("fake"),
        "messages": JSON | st.lists(MESSAGE, max_size=3),
        "temperature": JSON,
        "stream": JSON,
        "n": JSON,
        "max_tokens": JSON,
    },
)


@QUICK
@given(JSON | CHAT)
def test_chat_bodies(server: Running, body: object) -> None:
    url = f"{server.url}/v1/chat/completions"
    check(HTTP.post(url, content=json.dumps(body).encode()))


@QUICK
@given(st.text(max_size=40))
def test_paths(server: Running, path: str) -> None:
    plain = "".join(c for c in path if c.isprintable() and c not in "?#%\\")
    check(HTTP.get(f"{server.url}/{plain}"))
    check(HTTP.get(f"{server.url}/v1/models/{plain}"))


def test_page_files_cannot_be_left(server: Running) -> None:
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "//etc/passwd", "/page/"):
        assert HTTP.get(server.url + path).status_code == 404


def test_odd_requests(server: Running, tmp_path: Path) -> None:
    url = f"{server.url}/v1/audio/translations"
    check(HTTP.post(url, headers={"content-type": "multipart/form-data"}))
    check(HTTP.request("DELETE", url))
    check(HTTP.get(f"{server.url}/v1/models", headers={"host": "["}))
