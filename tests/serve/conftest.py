"""Servers on real sockets, in this process."""

import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
import uvicorn

from serve.app import create_app
from serve.service import Service
from serve.settings import ServeSettings
from tests import tiny
from tests.serve.fakes import FakeTranslator

DEADLINE_S = 60.0


def wav(duration_s: float, seed: int = 0, **options: Any) -> bytes:
    """A tone as a WAV file."""
    file = io.BytesIO()
    options = {"format": "WAV", "subtype": "PCM_16", **options}
    soundfile.write(file, tiny.tone(duration_s, seed), 16_000, **options)
    return file.getvalue()


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until something that must happen has happened."""
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.005)


# One for all: making a client reads the machine's certificates, which no test needs.
HTTP = httpx.Client(verify=False, trust_env=False, timeout=DEADLINE_S)


@dataclass
class Running:
    """A server and ways to talk to it."""

    url: str
    service: Service

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(
        self, audio: bytes | None = None, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        files = {} if audio is None else {"file": ("a.wav", audio)}
        data = {"model": "fake", **{key: str(value) for key, value in fields.items()}}
        url = f"{self.url}/v1/audio/translations"
        return HTTP.post(url, files=files, data=data, headers=headers)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return HTTP.get(self.url + path, **options)

    def nothing_left(self) -> bool:
        """Whether no request holds anything any more."""
        models = self.service.registry.models.values()
        files = list(self.service.directory.iterdir())
        return not (self.service.running or files or any(model.users for model in models))


@contextmanager
def serving(settings: ServeSettings, open_translator: Any = None) -> Iterator[Running]:
    """Serves in a thread until the block ends."""
    service = Service(settings, open_translator)
    app = create_app(settings, service=service)
    config = uvicorn.Config(
        app, http="h11", ws="none", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            eventually(lambda: server.started or not thread.is_alive())
            assert server.started
            yield Running(f"http://127.0.0.1:{port}", service)
        finally:
            server.should_exit = True
            thread.join(DEADLINE_S)


@pytest.fixture
def fake() -> FakeTranslator:
    return FakeTranslator()


@pytest.fixture
def serve_fake(fake: FakeTranslator, tmp_path: Path) -> Callable[..., Any]:
    """Serves a fake translator with settings of the test's choice."""
    model = tmp_path / "fake"
    model.mkdir()
    (model / "package.json").write_text('{"languages": ["de", "zh"]}')

    def start(**settings: Any) -> Any:
        uploads = tmp_path / "uploads"
        uploads.mkdir()
        values = {"models": (str(model),), "temp_dir": uploads, **settings}
        return serving(ServeSettings(**values), lambda path, settings: fake)

    return start


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """Half a minute of tones with pauses between them."""
    parts = []
    for index in range(10):
        parts += [tiny.tone(2.6, index), np.zeros(6_400, np.float32)]
    return np.concatenate(parts)
