"""The documented load balancer before two servers: one may die under load and nobody notices."""

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import eventually, wav
from tests.serve.test_run import Load, process

CONFIGURATION = Path(__file__).parents[2] / "docs" / "nginx-halve.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


@contextmanager
def balancer(directory: Path, servers: list[str]) -> Iterator[str]:
    """nginx with the documented configuration, and only addresses changed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    text = CONFIGURATION.read_text(encoding="utf8")
    for documented, url in zip(("10.0.0.11:8000", "10.0.0.12:8000"), servers, strict=True):
        assert documented in text
        text = text.replace(documented, url.removeprefix("http://"))
    text, changed = re.subn(r"listen 8080;", f"listen 127.0.0.1:{port};", text)
    assert changed == 1
    spool = "".join(
        f"{kind}_temp_path {directory / kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Started by root, its workers would be a user who may not write here.
    user = "user root;\n" if os.geteuid() == 0 else ""
    whole = f"{user}pid {directory / 'pid'};\nerror_log {directory / 'log'};\nevents {{}}\n"
    whole += f"http {{\naccess_log off;\n{spool}{text}\n}}\n"
    (directory / "nginx.conf").write_text(whole)
    command = [str(NGINX), "-p", str(directory), "-c", str(directory / "nginx.conf")]
    proxy = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: proxy.poll() is not None or _answers(url))
        assert proxy.poll() is None, (directory / "log").read_text()
        yield url
    finally:
        proxy.terminate()
        proxy.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def _served(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    found = re.search(r'halve_requests_total\{endpoint="/v1/audio/\w+",status="200"\} (\S+)', text)
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_one_of_two_servers_ends_under_load(tmp_path: Path, how: signal.Signals) -> None:
    with ExitStack() as stack:
        servers, urls = [], []
        for name in ("one", "two"):
            directory = tmp_path / name
            directory.mkdir()
            (directory / "go").touch()
            server, url = stack.enter_context(process(directory, drain_s=60))
            servers.append(server)
            urls.append(url)
        proxy_directory = tmp_path / "nginx"
        proxy_directory.mkdir()
        url = stack.enter_context(balancer(proxy_directory, urls))
        load = Load(url, clients=6)
        eventually(lambda: _served(urls[0]) > 5 and _served(urls[1]) > 5)
        servers[0].send_signal(how)
        servers[0].wait(60)
        before = load.statuses["200"]
        eventually(lambda: load.statuses["200"] > before + 30)
        assert set(load.statuses) == {"200"}
        load.stop()
        load.join()
    assert set(load.statuses) == {"200"}


def test_the_page_and_streams_pass_through(tmp_path: Path) -> None:
    with ExitStack() as stack:
        urls = []
        for name in ("one", "two"):
            directory = tmp_path / name
            directory.mkdir()
            (directory / "go").touch()
            urls.append(stack.enter_context(process(directory, drain_s=60))[1])
        proxy_directory = tmp_path / "nginx"
        proxy_directory.mkdir()
        url = stack.enter_context(balancer(proxy_directory, urls))
        assert httpx.get(url).status_code == 200
        # As a browser on that page posts.
        answer = httpx.post(
            f"{url}/v1/audio/translations",
            headers={"origin": url},
            data={"model": "fake", "stream": "true"},
            files={"file": ("a.wav", wav(0.5))},
        )
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "transcript.text.done" in answer.text
