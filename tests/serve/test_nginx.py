"""The documented load balancer before two servers: one may die under load and nobody notices."""

import re
import signal
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
        url = stack.enter_context(balancer(proxy_directory, urls)).url
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
        urls = []
        for name in ("one", "two"):
            directory = tmp_path / name
            directory.mkdir()
            (directory / "go").touch()
            urls.append(stack.enter_context(process(directory, drain_s=60, max_queue=1))[1])
        proxy_directory = tmp_path / "nginx"
        proxy_directory.mkdir()
        url = stack.enter_context(balancer(proxy_directory, urls)).url
        load = Load(url, clients=8)  # those that are refused leave
        eventually(lambda: load.statuses["200"] > 60 and load.statuses["429"] > 0)
        assert httpx.get(f"{url}/health").status_code == 200
        load.stop()
        load.join()
    assert set(load.statuses) == {"200", "429"}


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
        url = stack.enter_context(balancer(proxy_directory, urls)).url
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
