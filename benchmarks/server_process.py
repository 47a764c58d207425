"""`halve serve` as a process of its own, for benches and soaks."""

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.latency import pinned_environment
from halve.errors import HalveError

SERVE = (sys.executable, "-m", "pipeline.cli", "serve")
_STOP_S = 60.0


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    url: str
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        return self.process.pid


@contextlib.contextmanager
def serving(
    models: Sequence[Path],
    options: Sequence[str] = (),
    *,
    threads: int | None = None,
    startup_s: float = 180.0,
    command: Sequence[str] = SERVE,
) -> Iterator[Server]:
    """Runs a server on a free port of loopback while the block lasts.

    Args:
        options: more of its command line.
        threads: that each model computes with; None: all cores.

    Raises:
        HalveError: it ended, or was not ready in time.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [argument for path in models for argument in ("--model", str(path))]
    arguments += ["--host", "127.0.0.1", "--port", str(port), *options]
    if threads:
        arguments += ["--threads", str(threads)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=pinned_environment(threads),
        )
        try:
            if not _wait_until_ready(process, url, startup_s):
                log.seek(0)
                said = log.read().decode("utf8", errors="replace").strip().splitlines()
                raise HalveError(
                    f"halve serve did not become ready ({said[-1] if said else 'it said nothing'})",
                    expected=f"an answer of {url}/ready within {startup_s:.0f} s",
                    mend=f"try `halve serve {' '.join([*arguments[:2], *options])}`",
                )
            yield Server(url, process)
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, most_s: float) -> bool:
    end = time.monotonic() + most_s
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/ready").status_code == 200:
                    return True
            time.sleep(0.1)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
