"""`halve serve` as a process of its own, for benches and soaks."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
    port = free_port()
    arguments = [argument for path in models for argument in ("--model", str(path))]
    arguments += ["--host", "127.0.0.1", "--port", str(port), *options]
    if threads:
        arguments += ["--threads", str(threads)]
    with running(
        [*command, *arguments],
        f"http://127.0.0.1:{port}",
        "/ready",
        name="halve serve",
        env=pinned_environment(threads),
        startup_s=startup_s,
        mend=f"try `halve serve {' '.join([*arguments[:2], *options])}`",
    ) as server:
        yield server


@contextlib.contextmanager
def running(
    command: Sequence[str],
    url: str,
    ready: str,
    *,
    name: str,
    env: Mapping[str, str],
    startup_s: float,
    mend: str,
    of_its_own: bool = False,
) -> Iterator[Server]:
    """Runs any server while the block lasts.

    Args:
        ready: path that answers 200 once it serves.
        name: what a message calls it.
        mend: what to do if it does not start.
        of_its_own: in a process group of its own, so that `kill` takes the processes that it has started with it.
            What ends this process from outside then no longer reaches it.

    Raises:
        HalveError: it ended, or was not ready in time.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(env),
            start_new_session=of_its_own,
        )
        try:
            if not _wait_until_ready(process, url + ready, startup_s):
                log.seek(0)
                said = log.read().decode("utf8", errors="replace").strip().splitlines()
                raise HalveError(
                    f"{name} did not become ready ({said[-1] if said else 'it said nothing'})",
                    expected=f"an answer of {url}{ready} within {startup_s:.0f} s",
                    mend=mend,
                )
            yield Server(url, process)
        finally:
            _stop(process)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, most_s: float) -> bool:
    end = time.monotonic() + most_s
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    return True
            time.sleep(0.1)
    return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_S)
    finally:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a server at once, as a machine that fails does; of a group of its own, all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()
