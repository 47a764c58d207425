"""The other runtimes that `halve bench latency --peers` times on the same weights.

transformers runs the whole road from audio to text. The others run the decoder alone, as a text model
extracted from the speech model, after a prompt of as many positions as the clip has.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer_names import PeerName
from benchmarks.turns import Contender
from halve.errors import HalveError
from halve.families import family_for
from halve.languages import language
from halve.models import load_processor, read_config

POSITIONS_PER_S = 25
"""Positions of a second of audio among a decoder's inputs (Whisper's 50, pooled by two)."""


@dataclass(frozen=True)
class Peer:
    """What runs a peer and how it is installed."""

    precision: str
    environment: str = ""
    """Its own Python environment, where it cannot share halve's."""
    whole: bool = False
    """Runs from audio to text, not the decoder alone."""
    cut_audio: bool = False
    compiled: bool = False
    """Installing it compiles it from source."""


PEERS: dict[PeerName, Peer] = {
    "transformers-fp32": Peer("fp32", whole=True),
    "transformers-fp32-cut": Peer("fp32", whole=True, cut_audio=True),
    "transformers-bf16": Peer("bf16", whole=True),
    "transformers-nf4": Peer("nf4", whole=True),
    "torch-onnx-fp32": Peer("fp32", environment="onnx"),
    "torch-onnx-int8": Peer("int8", environment="onnx"),
    "torch-onnx-int4": Peer("int4", environment="onnx"),
    "genai-int4": Peer("int4", environment="onnx"),
    "genai-int4-block128": Peer("int4", environment="onnx"),
    "genai-int4-kv8": Peer("int4", environment="onnx"),
    "optimum-fp32": Peer("fp32", "optimum"),
    "optimum-int8": Peer("int8", "optimum"),
    "ctranslate2-int8": Peer("int8", "ctranslate2"),
    "llama.cpp-f16": Peer("fp16", "llama", compiled=True),
    "llama.cpp-q8_0": Peer("int8", "llama", compiled=True),
    "llama.cpp-q4_0": Peer("int4", "llama", compiled=True),
}


def python_of(peer: Peer, environments: Path) -> str:
    """The interpreter that runs a peer.

    Raises:
        HalveError: its environment is not there.
    """
    if not peer.environment:
        return sys.executable
    python = environments / peer.environment / "bin" / "python"
    if not python.is_file():
        raise HalveError(
            f"There is no environment {python.parent.parent} for this peer",
            mend=f"bash benchmarks/peer_environments.sh {environments} {peer.environment}",
        )
    return str(python)


class TextPeers:
    """The decoder of one model, converted for each peer and timed there.

    Conversions are kept in `folder` under a hash of the model's weights, for the next run.
    """

    def __init__(
        self, model: Path, lang: str, durations_s: Mapping[str, float], folder: Path
    ) -> None:
        self._model, self._environments = model, folder
        self._folder = folder / "converted" / _digest(model)
        before, after = family_for(read_config(model)).prompt_ids(
            load_processor(model), family_for(read_config(model)).instruction(language(lang))
        )
        self._positions = {
            clip: len(before) + len(after) + int(POSITIONS_PER_S * duration_s)
            for clip, duration_s in durations_s.items()
        }

    def prepare(self, names: Sequence[PeerName], variables: Mapping[str, str]) -> None:
        """Extracts the decoder and converts it for every peer that is not converted yet."""
        text = self._folder / "text"
        if not all(path.is_file() for path in self._prompts().values()):
            command = [sys.executable, "-m", "benchmarks.text_part", str(self._model), str(text)]
            command += [str(count) for count in sorted(set(self._positions.values()))]
            _run(command, b"", variables, "taking the decoder out", None)
        for name in names:
            self._ask(name, {"action": "prepare", "text_model": str(text)}, variables, None)

    def measure(
        self, name: PeerName, settings: Mapping[str, Any], variables: Mapping[str, str]
    ) -> dict[str, Any]:
        """One peer's timings, from a fresh process; settings: threads, warmup, repeats, new_tokens."""
        request = {"action": "measure", "prompts": self._prompt_files(), **settings}
        return self._ask(name, request, variables, settings["timeout_s"])

    def contender(
        self, name: PeerName, settings: Mapping[str, Any], variables: Mapping[str, str]
    ) -> Contender:
        """One peer in a process that waits for its turns; settings: threads, new_tokens."""
        request = {"prompts": self._prompt_files(), **settings}
        return Contender(self._command(name), self._request(name, request), variables)

    def _prompt_files(self) -> dict[str, str]:
        return {clip: str(path) for clip, path in self._prompts().items()}

    def _prompts(self) -> dict[str, Path]:
        text = self._folder / "text"
        return {clip: text / f"prompt-{count}.npz" for clip, count in self._positions.items()}

    def _ask(
        self,
        name: PeerName,
        request: Mapping[str, Any],
        variables: Mapping[str, str],
        timeout_s: float | None,
    ) -> dict[str, Any]:
        full = json.dumps(self._request(name, request)).encode()
        doing = f"{request['action']} of {name}"
        found: dict[str, Any] = json.loads(
            _run(self._command(name), full, variables, doing, timeout_s)
        )
        return found

    def _command(self, name: PeerName) -> list[str]:
        return [python_of(PEERS[name], self._environments), "-m", "benchmarks.peer_worker"]

    def _request(self, name: PeerName, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"peer": name, "folder": str((self._folder / name).resolve()), **request}


def _run(
    command: list[str],
    stdin: bytes,
    variables: Mapping[str, str],
    doing: str,
    timeout_s: float | None,
) -> bytes:
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            check=False,
            env=dict(variables),
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise HalveError(
            f"{doing} took longer than {timeout_s:.0f} s", mend="raise --timeout-s"
        ) from None
    if done.returncode != 0:
        said = done.stderr.decode("utf8", errors="replace").strip().splitlines()
        raise HalveError(
            f"{doing} failed ({said[-1] if said else f'exit {done.returncode}'})",
            mend="leave this peer out of --peers, or make its environment again",
        )
    return done.stdout


def _digest(model: Path) -> str:
    """Names a model by its configuration and weights."""
    found = hashlib.sha256()
    for path in [model / "config.json", *sorted(model.glob("*.safetensors"))]:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]
