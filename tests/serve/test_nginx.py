"""The documented load balancer before two servers: one may die under load and nobody notices."""

import re
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.balancer import NGINX, balancer
from tests.serve.conftest import eventually, wav
from tests.serve.test_run import Load, process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


def _served(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    found = re.search(r'halve_requests_total\{endpoint="/v1/audio/\w+",status="200"\} (\S+)', text)
    return float(found[1]) if found else 0.0


def two_servers(
    stack: ExitStack, folder: Path, max_queue: int = 64
) -> tuple[list[subprocess.Popen], list[str], str]:
    """Two servers and nginx before them, until `stack` ends: processes, their addresses, nginx's."""
    servers, urls = [], []
    for name in ("one", "two"):
        directory = folder / name
        directory.mkdir()
        (directory / "go").touch()
        server, url = stack.enter_context(process(directory, drain_s=60, max_queue=max_queue))
        servers.append(server)
        urls.append(url)
    proxy = folder / "nginx"
    proxy.mkdir()
    return servers, urls, stack.enter_context(balancer(proxy, urls)).url


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_one_of_two_servers_ends_under_load(tmp_path: Path, how: signal.Signals) -> None:
    with ExitStack() as stack:
        servers, urls, url = two_servers(stack, tmp_path)
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


def test_full_servers_refuse_and_go_on(tmp_path: Path) -> None:
    """More clients than both take on: 429 from halve, and never the balancer's own error."""
    with ExitStack() as stack:
        _, _, url = two_servers(stack, tmp_path, max_queue=1)
        load = Load(url, clients=8)  # those that are refused leave
        eventually(lambda: load.statuses["200"] > 60 and load.statuses["429"] > 0)
        assert httpx.get(f"{url}/health").status_code == 200
        load.stop()
        load.join()
    assert set(load.statuses) == {"200", "429"}


def test_the_page_and_streams_pass_through(tmp_path: Path) -> None:
    with ExitStack() as stack:
        _, _, url = two_servers(stack, tmp_path)
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
