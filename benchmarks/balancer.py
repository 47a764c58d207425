"""The load balancer of docs/serving.md: nginx with the documented configuration, only addresses changed."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.server_process import Server, free_port, running
from halve.errors import HalveError

CONFIGURATION = Path(__file__).parents[1] / "docs" / "nginx-halve.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
DOCUMENTED = ("10.0.0.11:8000", "10.0.0.12:8000")


def need_nginx() -> None:
    """Raises HalveError where there is no nginx."""
    if NGINX is None:
        raise HalveError("nginx is not installed", mend="install it: apt-get install nginx-light")


@contextlib.contextmanager
def balancer(directory: Path, urls: Sequence[str]) -> Iterator[Server]:
    """Runs nginx before two servers while the block lasts.

    Args:
        directory: an empty one, for its configuration and its temporary files.
        urls: of the servers, which answer /health.

    Raises:
        HalveError: nginx is not there, or did not start.
    """
    need_nginx()
    port = free_port()
    (directory / "nginx.conf").write_text(_whole(directory, port, urls), encoding="utf8")
    command = [str(NGINX), "-p", str(directory), "-c", str(directory / "nginx.conf")]
    with running(
        [*command, "-g", "daemon off;"],
        f"http://127.0.0.1:{port}",
        "/health",
        name="nginx",
        env=os.environ,
        startup_s=60,
        mend=f"read {directory / 'log'}",
    ) as proxy:
        yield proxy


def _whole(directory: Path, port: int, urls: Sequence[str]) -> str:
    text = CONFIGURATION.read_text(encoding="utf8")
    for documented, url in zip(DOCUMENTED, urls, strict=True):
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
    return f"{whole}http {{\naccess_log off;\n{spool}{text}\n}}\n"
