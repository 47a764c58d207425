"""Models on the hub: what it refuses is told with what to do, and what needs no weights fetches none."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from halve.models import read_config
from tests.pipeline.conftest import environment
from tests.pipeline.test_bad_input import refused

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Answers as the hub does: it has one open model and a gated one, both with the same files."""

    def __init__(self, model: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.model = model
        self.given: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """The hub's addresses that a snapshot is fetched from."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository not in ("some/open", "some/gated"):
            self._answer(401, code="RepoNotFound")
        elif parts[0] == "api" and "tree" in parts:
            self._answer(200, json.dumps([self._entry(path) for path in self._files()]).encode())
        elif parts[0] == "api":
            siblings = [{"rfilename": path.name} for path in self._files()]
            facts = {"id": repository, "sha": COMMIT, "siblings": siblings, "tags": []}
            self._answer(200, json.dumps(facts).encode())
        elif repository == "some/gated":
            self._answer(403, code="GatedRepo")
        else:
            self.server.given.append(parts[-1])
            self._answer(200, (self.server.model / parts[-1]).read_bytes(), etag=parts[-1])

    do_HEAD = do_GET

    def _files(self) -> list[Path]:
        return sorted(path for path in self.server.model.iterdir() if path.is_file())

    def _entry(self, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        return {"type": "file", "path": path.name, "size": size, "oid": "1" * 40}

    def _answer(self, status: int, body: bytes = b"", code: str = "", etag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    server = Hub(tiny_model)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


Asked = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Asked:
    """`halve ARGUMENTS…` with that hub and an empty cache; without it where `online` is False."""

    def run(*arguments: object, online: bool = True) -> "subprocess.CompletedProcess[str]":
        given = {key: value for key, value in environment().items() if not key.startswith("HF_")}
        given |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
        given |= {} if online else {"HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False
        )

    return run


@pytest.mark.parametrize("command", [("prune", "--layers", 2), ("plan", "--budget", "4GB")])
def test_refusals_say_what_to_do(command: tuple[object, ...], ask: Asked, tmp_path: Path) -> None:
    first, *rest = command
    for model, words in (
        ("some/gated", ("gated", "accept its terms", "hf auth login")),
        ("some/absent", ("some/absent", "check the path or the hub id", "hf auth login")),
    ):
        refused(ask(first, "--model", model, *rest), 2, *words)
    words = ("some/open", "check the network", "hf download some/open --local-dir DIR")
    refused(ask(first, "--model", "some/open", *rest, online=False), 2, *words)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_budget_and_a_dry_run_fetch_the_config_alone(
    ask: Asked, hub: Hub, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"lang: de\nteacher: some/open\ncorpus: {{source: {tiny_corpus}, format: halve}}\n"
        "prune: {layers: [2, 3]}\n"
    )
    done = ask("run", recipe, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    whole, less = (json.loads(done.stdout)[f"{name}_parameters"] for name in ("teacher", "student"))
    assert whole > less > 0
    done = ask("plan", "--model", "some/open", "--budget", "1GB", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["logical_parameters"] == whole
    assert set(hub.given) == {"config.json"}
    options = ("--corpus", tiny_corpus, "--lang", "de", "--write", "mine.yaml")
    done = ask("plan", "--model", "some/open", "--budget", "1GB", *options)
    assert done.returncode == 0, done.stderr
    assert "tokenizer.json" in hub.given
    assert "model.safetensors" not in hub.given
    written = (tmp_path / "mine.yaml").read_text()
    assert "teacher: some/open" in written
    assert "duplicates: keep" in written, "what the corpus was imported with need not be known"


def test_a_model_of_the_hub_is_pruned(
    ask: Asked, hub: Hub, tiny_model: Path, tmp_path: Path
) -> None:
    done = ask("prune", "--model", "some/open", "--layers", 2, "--out", "pruned")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.given
    before, after = (read_config(path)["text_config"] for path in (tiny_model, tmp_path / "pruned"))
    assert after["num_hidden_layers"] == before["num_hidden_layers"] - 1
