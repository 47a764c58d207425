"""A server process from its first line to its last."""

import errno
import logging
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from halve.errors import InputError
from halve.progress import Progress
from serve.run import _show_log, run_server
from serve.settings import ServeSettings
from tests.serve.conftest import wav
from tests.serve.fakes import FakeTranslator

ROOT = Path(__file__).parents[2]


@contextmanager
def process(
    directory: Path, drain_s: float, max_queue: int = 64
) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    command = [sys.executable, "-m", "tests.serve.server_process"]
    arguments = [str(directory), str(drain_s), str(max_queue)]
    server = subprocess.Popen([*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + server.stderr.read()
        yield server, found[0]
    finally:
        server.kill()
        server.wait()


class Load:
    """Clients that send one request after another until the server is gone."""

    def __init__(self, url: str, clients: int) -> None:
        self.statuses: Counter[str] = Counter()
        self._url = f"{url}/v1/audio/translations"
        self._stopped = threading.Event()
        self._audio = wav(0.4)
        self._threads = [threading.Thread(target=self._send) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stopped.is_set():
                try:
                    answer = client.post(
                        self._url, data={"model": "fake"}, files={"file": ("a.wav", self._audio)}
                    )
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    self.statuses[type(error).__name__] += 1
                    return
                self.statuses[str(answer.status_code)] += 1
                if answer.status_code != 200:
                    return

    def stop(self) -> None:
        """Each client ends after the request that it waits for."""
        self._stopped.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


def test_term_under_load_loses_nothing_and_exits_with_0(tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    with process(tmp_path, drain_s=60) as (server, url):
        load = Load(url, clients=8)
        while load.statuses["200"] < 12:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        load.join()
    assert set(load.statuses) <= {"200", "503"}
    assert not list((tmp_path / "uploads").iterdir())


def test_what_cannot_be_finished_does_not_keep_the_process(tmp_path: Path) -> None:
    with process(tmp_path, drain_s=0.3) as (server, url):
        load = Load(url, clients=2)
        while "running 2" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        load.join()
    assert load.statuses == {"503": 2}
    assert not list((tmp_path / "uploads").iterdir())


def test_while_draining_new_work_is_sent_elsewhere(tmp_path: Path) -> None:
    with process(tmp_path, drain_s=60) as (server, url):
        load = Load(url, clients=1)
        while "running 1" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{url}/ready")).status_code == 200:
            time.sleep(0.01)
        assert ready.json() == {"status": "draining"}
        files = {"file": ("a.wav", wav(0.4))}
        answer = httpx.post(f"{url}/v1/audio/translations", data={"model": "fake"}, files=files)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert answer.headers["retry-after"]
        (tmp_path / "go").touch()
        assert server.wait(60) == 0
        load.join()
    assert load.statuses["200"] == 1


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServeSettings(models=(str(tmp_path / "fake"),), port=port)
        with pytest.raises(InputError, match="--port"):
            run_server(settings, open_translator=lambda path, settings: FakeTranslator())


def test_a_port_taken_while_the_model_loads_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    others: list[socket.socket] = []

    def open_slowly(path: str, settings: ServeSettings) -> FakeTranslator:
        # Both may bind, since neither listened then.
        others.append(socket.create_server(("127.0.0.1", port)))
        return FakeTranslator()

    settings = ServeSettings(models=(str(tmp_path / "fake"),), port=port, temp_dir=tmp_path)
    try:
        with pytest.raises(InputError, match="--port"):
            run_server(settings, open_translator=open_slowly)
    finally:
        for other in others:
            other.close()
    assert others
    assert [path.name for path in tmp_path.iterdir()] == ["fake"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_first_model_loads(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "fake").mkdir()
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    script = f"""
import sys, time
from pathlib import Path
from serve.run import run_server
from serve.settings import ServeSettings
def open_for_ever(path, settings):
    print("loading", file=sys.stderr, flush=True)
    time.sleep(600)
settings = ServeSettings(models=({str(tmp_path / "fake")!r},), port=0, temp_dir=Path({str(uploads)!r}))
run_server(settings, open_translator=open_for_ever)
"""
    command = [sys.executable, "-c", script]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        assert server.stderr.readline() == "loading\n"
        assert list(uploads.iterdir())
        server.send_signal(number)
        assert server.wait(60) == 0
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.wait()
    assert not list(uploads.iterdir())


def test_a_signal_that_does_not_wake_the_loop_is_seen(tmp_path: Path) -> None:
    """As one that comes between the loop's last look and its sleep: here another thread takes it."""
    (tmp_path / "fake").mkdir()
    script = f"""
import signal, threading, time
from serve.run import run_server
from serve.settings import ServeSettings
def open_for_ever(path, settings):
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    time.sleep(600)
run_server(ServeSettings(models=({str(tmp_path / "fake")!r},), port=0), open_translator=open_for_ever)
"""
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    """Those that the server shows; as they were, afterwards."""
    found = [logging.getLogger(name) for name in ("halve.serve", "uvicorn.error")]
    kept = [(logger.handlers, logger.propagate) for logger in found]
    yield found
    for logger, (handlers, propagate) in zip(found, kept, strict=True):
        logger.handlers, logger.propagate = handlers, propagate


class Shown(Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.is_full = False

    def warn(self, text: str) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.warnings.append(text)


def test_who_logs_goes_on_when_nothing_can_be_written(
    loggers: list[logging.Logger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    shown = Shown()
    _show_log(shown)
    shown.is_full = True
    for logger in loggers:
        logger.warning("a piece of %.1f s failed", 1.0)
    shown.is_full = False
    loggers[0].error("a stream failed")
    assert shown.warnings == ["a stream failed"]


def test_offers_of_other_protocols_are_no_news(
    loggers: list[logging.Logger], serve_fake: Any
) -> None:
    """Java's client offers HTTP/2 with each request."""
    shown = Shown()
    _show_log(shown)
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMA"}
    with serve_fake() as server:
        assert server.post(wav(0.5), headers=offer).status_code == 200
    loggers[1].warning("Invalid HTTP request received.")
    assert shown.warnings == ["Invalid HTTP request received."]


def test_no_place_for_uploads_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "file").touch()
    for place in ("gone", "file"):
        settings = ServeSettings(
            models=(str(tmp_path / "fake"),), port=0, temp_dir=tmp_path / place
        )
        with pytest.raises(InputError, match="--temp-dir"):
            run_server(settings, open_translator=lambda path, settings: FakeTranslator())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_threads_share_heaps() -> None:
    script = """
import ctypes, threading
from serve.run import limit_heaps
assert limit_heaps()
libc = ctypes.CDLL(None)
together = threading.Barrier(9)
def allocate():
    libc.malloc(1000)
    together.wait()
for _ in range(8):
    threading.Thread(target=allocate).start()
together.wait()
libc.malloc_stats()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heaps = [line for line in done.stderr.splitlines() if line.startswith("Arena")]
    assert 1 <= len(heaps) <= 2
