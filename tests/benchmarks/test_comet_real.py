"""The real worker in COMET's real environment, on a small checkpoint made here. Run by `make slow`."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import comet, comet_environment
from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from tests import tiny

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("tiny_comet.py")
SOURCES = ["Open the file.", "Select a table.", "The text is deleted."]
REFERENCES = ["Öffnen Sie die Datei.", "Wählen Sie eine Tabelle.", "Der Text wird gelöscht."]
SYSTEMS = {"teacher": REFERENCES, "student": ["Öffnen die Datei", "", "Der Text"]}


@pytest.fixture(scope="module")
def python() -> Path:
    """Installed once and for all: `halve doctor --install-comet` finds the same one."""
    return comet_environment.install()


@pytest.fixture(scope="module")
def checkpoint(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tiny-comet")
    subprocess.run([python, "-I", SCRIPT, folder], check=True, capture_output=True)
    yield folder


def test_the_worker_gives_comets_own_scores(python: Path, checkpoint: Path) -> None:
    found = comet.measure(str(checkpoint), None, SYSTEMS, SOURCES, REFERENCES)
    assert found.measured, found.reason
    rows = [
        {"src": src, "mt": mt, "ref": ref}
        for name in SYSTEMS
        for src, mt, ref in zip(SOURCES, SYSTEMS[name], REFERENCES, strict=True)
    ]
    command = [python, "-I", SCRIPT, checkpoint, json.dumps(rows)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    own = json.loads(next(x for x in said.splitlines() if x.startswith("scores "))[7:])
    assert [*found.scores["teacher"], *found.scores["student"]] == pytest.approx(own, abs=1e-5)
    assert len(set(own)) > 1
    assert "|unbabel-comet:2.2.7|sha256:" in found.signature


def test_a_quality_result_has_comet_and_its_retention(checkpoint: Path, tmp_path: Path) -> None:
    teacher = tiny.make_model(tmp_path / "teacher", seed=0)
    student = tiny.make_model(tmp_path / "student", seed=1)
    corpus = tiny.make_corpus(tmp_path / "corpus")
    config = QualityConfig(
        lang="de", resamples=100, controls=False, comet_checkpoint=str(checkpoint)
    )
    run_quality(config, teacher, [student], corpus, tmp_path / "out")
    result = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf8"))
    assert result["comet"]["measured"]
    assert result["teacher"]["scores"]["comet"]["signature"].startswith(checkpoint.name)
    assert result["students"][0]["retention"]["comet"]["high"] >= 0


def test_a_broken_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "hparams.yaml").write_text((checkpoint / "hparams.yaml").read_text())
    found = comet.measure(str(tmp_path), None, SYSTEMS, SOURCES, REFERENCES)
    assert not found.measured
    assert "the worker failed" in found.reason
