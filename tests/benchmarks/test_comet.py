"""COMET's worker protocol, with a stand-in worker, and the reasons why COMET is not measured."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import comet, comet_environment, comet_worker, scoring
from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from halve.errors import HalveError, InputError
from halve.json_files import read_json, write_json
from halve.progress import SILENT
from pipeline import steps

SYSTEMS = {"teacher": ["eins", "zwei"], "student": ["eins", "drei"]}
SOURCES, REFERENCES = ["one", "two"], ["eins", "zwei"]

STAND_IN = """
import json, sys
lines = [json.loads(line) for line in sys.stdin.buffer if line.strip()]
assert lines[0]["batch_size"] == 8, lines[0]
for row in lines[1:]:
    score = 0.9 if row["mt"] == row["ref"] else 0.5
    print(json.dumps({"system": row["system"], "id": row["id"], "score": score}))
print(json.dumps({"done": True, "name": "wmt22-comet-da", "comet_version": "2.2.7",
                  "checkpoint_sha256": "0123456789abcdef", "segments": len(lines) - 1}))
"""


@pytest.fixture(autouse=True)
def no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed on this machine is not what these tests are about."""
    monkeypatch.setenv("HALVE_COMET", str(tmp_path / "no-comet"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    path = tmp_path / "comet-model" / "checkpoints" / "model.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    return str(tmp_path / "comet-model")


def _measure(checkpoint: str | None, python: str | None, worker: Path) -> comet.Comet:
    return comet.measure(checkpoint, python, SYSTEMS, SOURCES, REFERENCES, worker=worker)


def _script(folder: Path, text: str) -> Path:
    path = folder / "worker.py"
    path.write_text(text)
    return path


def test_scores_come_back_by_system(checkpoint: str, tmp_path: Path) -> None:
    found = _measure(checkpoint, sys.executable, _script(tmp_path, STAND_IN))
    assert found.measured, found.reason
    assert found.scores == {"teacher": [0.9, 0.9], "student": [0.9, 0.5]}
    assert found.signature == "wmt22-comet-da|unbabel-comet:2.2.7|sha256:0123456789ab"
    assert found.record()["text"].startswith("COMET measured")


@pytest.mark.parametrize(
    ("given", "python", "reason"),
    [
        (None, sys.executable, "no checkpoint was given"),
        ("/nowhere/model", sys.executable, "does not exist"),
        ("checkpoint", None, "halve doctor --install-comet"),
        ("checkpoint", "/nowhere/python", "interpreter /nowhere/python does not exist"),
    ],
)
def test_what_is_missing_is_said(
    given: str | None, python: str | None, reason: str, checkpoint: str
) -> None:
    found = _measure(checkpoint if given == "checkpoint" else given, python, comet.WORKER)
    assert not found.measured
    text = found.record()["text"]
    assert text.startswith("COMET not measured: ")
    assert reason in text


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("wmt22-comet-da/checkpoints/model.ckpt", "wmt22-comet-da"),
        ("wmt22-comet-da/model.ckpt", "wmt22-comet-da"),
        ("mine.ckpt", "mine.ckpt"),
        (
            "models--Unbabel--wmt22-comet-da/snapshots/0a1b2c/checkpoints/model.ckpt",
            "Unbabel/wmt22-comet-da",
        ),
    ],
)
def test_a_signature_names_the_model_not_its_commit(file: str, name: str) -> None:
    assert comet_worker.name_of(Path("/models") / file) == name


def test_an_interpreter_that_cannot_be_started_loses_no_bench(
    checkpoint: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("no program\n")
    assert "may not be started" in _measure(checkpoint, str(python), comet.WORKER).reason
    python.chmod(0o755)
    assert "cannot be started" in _measure(checkpoint, str(python), comet.WORKER).reason


def test_the_real_worker_says_why_it_failed(checkpoint: str) -> None:
    # This environment has no unbabel-comet: the worker's last line is the reason.
    found = _measure(checkpoint, sys.executable, comet.WORKER)
    assert "COMET not measured: the worker failed: ModuleNotFoundError" in found.record()["text"]


@pytest.mark.parametrize("text", ["print('hello')", "", "print('{\"done\": true}')"])
def test_half_an_answer_is_no_score(text: str, checkpoint: str, tmp_path: Path) -> None:
    found = _measure(checkpoint, sys.executable, _script(tmp_path, text))
    assert not found.measured
    assert "answer" in found.reason


@pytest.mark.parametrize(("count", "text"), [(4, "measured"), (3, "3 scores for 4 segments")])
def test_the_real_worker_runs_on_older_pythons(
    count: int, text: str, checkpoint: str, tmp_path: Path
) -> None:
    """Whose zip takes no `strict`; a model's scores are made up here."""
    worker = f"""
import sys
sys.path.insert(0, {str(comet.WORKER.parent)!r})
import comet_worker
comet_worker.zip = lambda *given: zip(*given)
comet_worker.predict = lambda checkpoint, rows, batch_size: [0.5] * {count}
comet_worker.comet_version = lambda: "2.2.7"
comet_worker.main()
"""
    found = _measure(checkpoint, sys.executable, _script(tmp_path, worker))
    assert found.measured == (count == 4), found.reason
    assert text in found.record()["text"]


def test_retention_of_means() -> None:
    kept = scoring.mean_retention([0.8, 0.9, 0.7, 0.8], [0.8, 0.9, 0.6, 0.7], resamples=500, seed=0)
    assert kept["percent"] == pytest.approx(93.75)
    assert kept["low"] < 93.75 < kept["high"]
    assert kept["difference"] == pytest.approx(-0.05)
    same = scoring.mean_retention([0.8, 0.9], [0.8, 0.9], resamples=100, seed=0)
    assert (same["percent"], same["p_value"]) == (100.0, 1.0)


def test_an_environment_is_not_made_over_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HalveError, match="holds something that halve has not made"):
        comet_environment.install(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "pyvenv.cfg").touch()  # a user's own
    with pytest.raises(HalveError, match="remove it, or name another directory"):
        comet_environment.install(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_finished_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "comet"
    monkeypatch.setenv("HALVE_COMET", str(folder))
    assert comet_environment.installed() is None
    (folder / "bin").mkdir(parents=True)
    needed = "".join(f"{each}\n" for each in comet_environment.REQUIREMENTS)
    (folder / ".complete").write_text(needed)
    assert comet_environment.installed() is None, "its interpreter has gone"
    (folder / "bin" / "python").touch()
    assert comet_environment.installed() == comet_environment.install() == folder / "bin" / "python"
    (folder / ".complete").write_text("unbabel-comet==1.0\n")
    assert comet_environment.installed() is None, "of earlier requirements"


def test_of_a_mean_below_nothing_no_share_is_kept() -> None:
    kept = scoring.mean_retention([-0.2, -0.1], [-0.4, -0.2], resamples=100, seed=0)
    assert (kept["percent"], kept["low"], kept["high"]) == (None, None, None)
    assert kept["difference"] == pytest.approx(-0.15)


def test_of_a_mean_of_nothing_no_share_is_kept() -> None:
    kept = scoring.mean_retention([0.0, 0.0], [0.5, 0.6], resamples=100, seed=0)
    assert (kept["percent"], kept["low"], kept["high"]) == (None, None, None)
    assert kept["difference"] == pytest.approx(0.55)
    assert scoring.kept_text(kept) == "-"
    assert scoring.kept_text({"percent": 91.26, "low": 90, "high": 92}) == "91.3 [90.0, 92.0]"
    assert scoring.kept_text(None) == ""


@pytest.mark.parametrize("setting", ["comet_checkpoint", "comet_python", "embedding_model"])
def test_what_is_named_and_not_there_stops_a_bench_before_it_translates(
    setting: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = QualityConfig(lang="de", **{setting: str(tmp_path / "nowhere")})
    with pytest.raises(InputError, match=r"nowhere does not exist"):
        run_quality(config, tiny_model, [], tiny_corpus, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def _install_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From now on there is an environment, whose worker is the stand-in."""
    monkeypatch.setattr(comet, "_installed", lambda: sys.executable)
    worker = partial(comet.measure, worker=_script(tmp_path, STAND_IN))
    monkeypatch.setattr(comet, "measure", worker)


def test_comet_that_could_not_be_measured_is_measured_when_it_can(
    checkpoint: str,
    tiny_model: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = QualityConfig(lang="de", limit=4, controls=False, comet_checkpoint=checkpoint)
    step = steps.quality(config, tiny_model, [], tiny_corpus, tmp_path / "out")
    made, ran = steps.carry_out(step, SILENT)
    before = (made.path / "hypotheses" / "tiny.txt").read_bytes()
    assert ran and not read_json(made.path / "quality.json")["comet"]["measured"]
    assert not steps.carry_out(step, SILENT)[1], "there is still no environment"
    _install_stand_in(monkeypatch, tmp_path)
    monkeypatch.setattr(
        "benchmarks.translations.open_translator", None
    )  # nothing is translated again
    made, ran = steps.carry_out(step, SILENT)
    assert ran and read_json(made.path / "quality.json")["comet"]["measured"]
    assert (made.path / "hypotheses" / "tiny.txt").read_bytes() == before
    assert not steps.carry_out(step, SILENT)[1]


def test_only_what_scores_is_done_again(
    checkpoint: str,
    tiny_model: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def step(**settings: Any) -> steps.Step:
        config = QualityConfig(lang="de", limit=4, controls=False, **settings)
        return steps.quality(config, tiny_model, [], tiny_corpus, tmp_path / "out")

    made, ran = steps.carry_out(step(), SILENT)
    before = (made.path / "hypotheses" / "tiny.txt").read_bytes()
    _install_stand_in(monkeypatch, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            "benchmarks.translations.open_translator", None
        )  # nothing is translated again
        scored = step(comet_checkpoint=checkpoint, resamples=200)
        made, ran = steps.carry_out(scored, SILENT)
    assert ran and read_json(made.path / "quality.json")["comet"]["measured"]
    assert (made.path / "hypotheses" / "tiny.txt").read_bytes() == before
    assert steps.up_to_date(scored)
    file = next(path for path in sorted(Path(checkpoint).rglob("*")) if path.is_file())
    file.write_bytes(file.read_bytes() + b"\n")
    assert not steps.up_to_date(scored), "another checkpoint in its place"
    assert steps.carry_out(step(beams=2), SILENT)[1], "other texts are made"


def test_a_worker_that_failed_is_asked_again(checkpoint: str, tmp_path: Path) -> None:
    """What made it fail may have passed; nothing is translated again."""
    config = QualityConfig(lang="de", comet_checkpoint=checkpoint, comet_python=sys.executable)
    scoring.write_lines(tmp_path / "sources.txt", SOURCES)
    found = {}
    for name, one in {
        "failed": _measure(checkpoint, sys.executable, _script(tmp_path, "raise SystemExit(3)")),
        "missing": _measure(checkpoint, None, comet.WORKER),
    }.items():
        write_json(tmp_path / scoring.RESULT, {"comet": one.record()})
        found[name] = comet.lacks_comet(config, tmp_path)
    assert found == {"failed": True, "missing": True}


def test_an_encoder_that_is_not_there_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.ckpt").write_bytes(b"weights")
    hparams = tmp_path / "hparams.yaml"
    hparams.write_text("pretrained_model: some/encoder-nobody-has\n")
    for given in (tmp_path, tmp_path / "checkpoints" / "model.ckpt"):
        missing = comet.what_is_missing(str(given), sys.executable, SOURCES)
        assert "encoder, some/encoder-nobody-has, are not in the hub's cache" in missing
    hparams.write_text(f"pretrained_model: {tmp_path}\n")
    assert comet.what_is_missing(str(tmp_path), sys.executable, SOURCES) == ""
    hparams.write_text("pretrained_model: /nowhere/encoder\n")
    assert "/nowhere/encoder does not exist" in comet.what_is_missing(
        str(tmp_path), sys.executable, SOURCES
    )
