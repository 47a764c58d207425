"""Scores with noise and by voice."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import conditions, scoring
from benchmarks.conditions import with_noise
from benchmarks.config import QualityConfig
from benchmarks.quality import run_quality
from halve import artefact
from halve.corpus import read_corpus
from halve.metrics import METRICS


@pytest.mark.parametrize("snr_db", [10.0, 0.0])
def test_noise_has_the_asked_power_and_falls_with_frequency(snr_db: float) -> None:
    clip = np.sin(np.arange(32000) / 7).astype(np.float32)
    noise = with_noise(clip, snr_db, "a") - clip
    assert 10 * np.log10(np.mean(clip**2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.01)
    power = np.abs(np.fft.rfft(noise)) ** 2
    octaves = [power[low : 2 * low].mean() for low in (100, 400, 1600, 6400)]
    falls = 10 * np.log10(np.array(octaves[:-1]) / np.array(octaves[1:]))
    assert falls == pytest.approx(np.full(3, 6.0), abs=1.5)  # two octaves each
    np.testing.assert_array_equal(with_noise(clip, snr_db, "a"), with_noise(clip, snr_db, "a"))
    assert not np.array_equal(with_noise(clip, snr_db, "a"), with_noise(clip, snr_db, "b"))


def test_silence_stays_silent() -> None:
    assert not with_noise(np.zeros(100, np.float32), 10.0, "a").any()
    assert len(with_noise(np.zeros(0, np.float32), 10.0, "a")) == 0


@pytest.fixture(scope="module")
def voiced(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus with voices, one of which `train` does not have."""
    path = tmp_path_factory.mktemp("voiced") / "corpus"
    shutil.copytree(tiny_corpus, path)
    lines = [json.loads(line) for line in (path / "manifest.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["voice"] = "new" if line["split"] == "test" and number % 2 else "known"
    (path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_bench_with_noise_and_voices(
    tiny_model: Path, voiced: Path, tmp_path: Path, quality_result: Path
) -> None:
    config = QualityConfig(lang="de", resamples=100, controls=False, noise_db=10.0, threads=1)
    student = tmp_path / "student"
    shutil.copytree(tiny_model, student)
    made = run_quality(config, tiny_model, [student], voiced, tmp_path / "out")
    result = json.loads((made.path / "quality.json").read_text())
    for model in (result["teacher"], result["students"][0]):
        assert {k: v["segments"] for k, v in model["by_voice"].items()} == {
            "trained": 3,
            "untrained": 3,
        }
        assert set(model["noisy"]["scores"]) == set(METRICS)
        assert (model["noisy"]["snr_db"], model["noisy"]["noise"]) == (10.0, "pink")
    files = scoring.read_result(made.path)
    assert files.hypotheses("tiny.noise") != files.hypotheses("tiny")
    assert result["students"][0]["noisy"]["retention"]["chrf++"]["percent"] == pytest.approx(100)
    assert conditions.faults(files) == []
    files.result["teacher"]["noisy"]["scores"]["bleu"] += 1
    files.result["teacher"]["by_voice"]["untrained"]["ter"] += 1
    assert [fault.split(":")[0] for fault in conditions.faults(files)] == [
        "tiny, noise, bleu",
        "tiny, untrained, ter",
    ]
    table = conditions.conditions_table(files.result)
    assert table is not None
    assert table.header[1:] == [
        "all",
        "voices in train (3)",
        "other voices (3)",
        "pink noise, 10 dB",
    ]
    assert artefact.verify(made.path) == []
    plain = json.loads((quality_result / "quality.json").read_text())
    assert "noisy" not in plain["teacher"]


def test_a_corpus_without_voices_has_none(tiny_corpus: Path) -> None:
    corpus = read_corpus(tiny_corpus)
    assert conditions.voices(corpus, corpus.split("test", "de")) == []
