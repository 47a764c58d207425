"""COMET through a worker in its own environment, or the reason why it was not measured."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import benchmarks.comet_worker
from benchmarks import comet_environment, scoring
from benchmarks.config import QualityConfig
from halve import environment
from halve.json_files import read_json
from halve.progress import SILENT, Progress

WORKER = Path(benchmarks.comet_worker.__file__)


NOT_MEASURED = "COMET not measured: "
_ENCODER_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class Comet:
    """COMET scores of several systems, or why there are none."""

    reason: str = ""
    """Why COMET was not measured; empty when it was."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Segment scores by system."""
    signature: str = ""

    @property
    def measured(self) -> bool:
        """Whether there are scores."""
        return not self.reason

    def record(self) -> dict[str, Any]:
        """What the quality result says about COMET."""
        if self.measured:
            return {"measured": True, "text": f"COMET measured: {self.signature}"}
        return {"measured": False, "text": f"{NOT_MEASURED}{self.reason}"}


def measure(
    checkpoint: str | None,
    python: str | None,
    systems: Mapping[str, Sequence[str]],
    sources: Sequence[str],
    references: Sequence[str],
    *,
    batch_size: int = 8,
    worker: Path = WORKER,
    progress: Progress = SILENT,
) -> Comet:
    """Scores every system in one run of the worker, so that the checkpoint is loaded once.

    A missing checkpoint or a worker that fails is no error: the result says so in words.

    Args:
        checkpoint: COMET directory or model.ckpt.
        python: interpreter of the environment that has unbabel-comet; the one that
            `halve doctor --install-comet` made where None.
        systems: hypotheses by system name, each as long as `sources` and `references`.
    """
    python = python or _installed()
    reason = _missing(checkpoint, python, sources)
    if reason:
        return Comet(reason=reason)
    rows = [
        {"system": name, "id": str(index), "src": src, "mt": mt, "ref": ref}
        for name, hypotheses in systems.items()
        for index, (src, mt, ref) in enumerate(zip(sources, hypotheses, references, strict=True))
    ]
    request = {"checkpoint": str(checkpoint), "batch_size": batch_size}
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in [request, *rows])
    progress.message(f"COMET: {len(rows)} hypotheses")
    environment.release_gpu_memory()  # the worker takes the GPU
    # -I keeps this folder and the user's own packages out of the worker's imports.
    try:
        done = subprocess.run(
            [str(python), "-I", str(worker)],
            input=lines.encode("utf8"),
            capture_output=True,
            check=False,
        )
    except OSError as error:  # it cannot be started
        comet = Comet(reason=f"{python} cannot be started: {error.strerror or error}")
        progress.warn(comet.record()["text"])
        return comet
    if done.returncode != 0:
        comet = Comet(reason=f"the worker failed: {_last_line(done.stderr)}")
    else:
        comet = _answers(done.stdout, {name: len(sources) for name in systems})
    if not comet.measured:
        progress.warn(comet.record()["text"])
    return comet


def could_measure(checkpoint: str | None, python: str | None, sources: Sequence[str]) -> bool:
    """Whether `measure` would find what it needs: a checkpoint with its encoder, an environment, and source texts."""
    return not what_is_missing(checkpoint, python, sources)


def what_is_missing(checkpoint: str | None, python: str | None, sources: Sequence[str]) -> str:
    """Why `measure` would measure nothing, in words; empty where it has what it needs."""
    return _missing(checkpoint, python or _installed(), sources)


def _installed() -> str | None:
    found = comet_environment.installed()
    return str(found) if found else None


def _missing(checkpoint: str | None, python: str | None, sources: Sequence[str]) -> str:
    if not checkpoint:
        return "no checkpoint was given (comet_checkpoint)"
    if not Path(checkpoint).exists():
        return f"the checkpoint {checkpoint} does not exist"
    if not python:
        return "unbabel-comet has no environment here (`halve doctor --install-comet` makes one)"
    if not os.access(python, os.X_OK) or not Path(python).is_file():
        return f"the interpreter {python} does not exist, or may not be started"
    if not all(sources):
        return "the corpus has segments without source text"
    return missing_encoder(Path(checkpoint))


def missing_encoder(checkpoint: Path) -> str:
    """What unbabel-comet would miss beside the checkpoint: config and tokenizer of the encoder that hparams.yaml names.

    It takes them from the hub's cache or from a folder; nothing is downloaded here.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent.parent
    try:
        encoder = str(yaml.safe_load((folder / "hparams.yaml").read_text())["pretrained_model"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""  # for the worker to say
    if Path(encoder).is_dir() or Path(encoder).is_absolute():
        return "" if Path(encoder).is_dir() else f"its encoder {encoder} does not exist"
    from huggingface_hub import try_to_load_from_cache

    cached = {
        name for name in _ENCODER_FILES if isinstance(try_to_load_from_cache(encoder, name), str)
    }
    if "config.json" in cached and len(cached) > 1:
        return ""
    return (
        f"config and tokenizer of its encoder, {encoder}, are not in the hub's cache "
        f"(`hf download {encoder} {' '.join(_ENCODER_FILES)}`)"
    )


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode("utf8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _answers(stdout: bytes, wanted: Mapping[str, int]) -> Comet:
    """Reads the worker's lines; anything but a complete answer counts as a failure."""
    scores: dict[str, list[float]] = {name: [] for name in wanted}
    summary: dict[str, Any] = {}
    try:
        for line in stdout.decode("utf8").splitlines():
            record = json.loads(line)
            if record.get("done"):
                summary = record
            else:
                scores[record["system"]].append(float(record["score"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Comet(reason=f"the worker's answer cannot be read ({error})")
    if not summary or any(len(scores[name]) != count for name, count in wanted.items()):
        return Comet(reason="the worker's answer is not complete")
    signature = (
        f"{summary['name']}|unbabel-comet:{summary['comet_version']}"
        f"|sha256:{summary['checkpoint_sha256'][:12]}"
    )
    return Comet(scores=scores, signature=signature)


def lacks_comet(config: QualityConfig, result: Path) -> bool:
    """Whether a result has no COMET that was asked for and could be measured by now."""
    sources = scoring.read_lines(result / "sources.txt")
    if not could_measure(config.comet_checkpoint, config.comet_python, sources):
        return False
    comet = read_json(result / scoring.RESULT).get("comet", {})
    # A worker that failed is asked again: only itself is run, nothing is translated.
    return not comet.get("measured")
