"""Whatever a user gets wrong: one clear line, the right exit code, nothing half-written."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from halve.families import FAMILIES
from tests import tiny
from tests.pipeline.conftest import Halve


def refused(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> str:
    """Asserts a failure in one line, and returns the line."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in lines[0], (word, lines[0])
    return lines[0]


@pytest.fixture
def broken_audio(tmp_path: Path) -> dict[str, Path]:
    text, empty = tmp_path / "text.wav", tmp_path / "empty.wav"
    text.write_text("these are words\n")
    empty.touch()
    return {"text": text, "empty": empty, "missing": tmp_path / "missing.wav"}


def test_audio_that_cannot_be_used(
    halve: Halve, tiny_model: Path, broken_audio: dict[str, Path]
) -> None:
    model = ("--model", tiny_model, "--lang", "de")
    refused(halve("translate", *model, broken_audio["missing"]), 2, "missing.wav", "no such")
    refused(
        halve("translate", *model, broken_audio["text"]), 2, "text.wav", "not readable as audio"
    )
    refused(halve("translate", *model, broken_audio["empty"]), 2, "empty.wav", "0 bytes")
    all_of_them = halve("translate", *model, *broken_audio.values())
    assert all(path.name in all_of_them.stderr for path in broken_audio.values())


def test_every_ordinary_audio_format_works(halve: Halve, tiny_model: Path, tmp_path: Path) -> None:
    samples = tiny.tone(1.0, 3)
    files = []
    for name, rate, channels, subtype in (
        ("8bit", 16_000, 1, "PCM_U8"),
        ("24bit", 48_000, 2, "PCM_24"),
        ("surround", 44_100, 6, "PCM_16"),
        ("telephone", 8_000, 1, "ULAW"),
    ):
        files.append(tmp_path / f"{name}.wav")
        data = np.repeat(samples[:, None], channels, axis=1)
        soundfile.write(files[-1], data, rate, subtype=subtype)
    done = halve("translate", "--model", tiny_model, "--lang", "de", "--json", *files)
    assert done.returncode == 0, done.stderr
    lines = json.loads(done.stdout)
    assert [Path(line["name"]).stem for line in lines] == ["8bit", "24bit", "surround", "telephone"]
    # The same samples played at another rate last as long as the rate says.
    assert [round(line["duration_s"], 2) for line in lines] == [1.0, 0.33, 0.36, 2.0]


def test_wrong_usage(halve: Halve, tiny_model: Path, tiny_corpus: Path) -> None:
    search = ("importance", "--model", tiny_model, "--corpus", tiny_corpus)
    refused(halve(*search, "--lang", "klingon", "--remove", 1), 2, "Unknown language 'klingon'")
    refused(halve(*search, "--lang", "de", "--remove", 5), 2, "at most 4")
    refused(halve(*search, "--lang", "de", "--remove", 0), 2, "--remove", "greater than 0")
    refused(halve(*search, "--lang", "de"), 2, "--remove")
    refused(halve("nonsense"), 2, "nonsense")
    refused(halve("prune", "--model", "no/where/at/all", "--layers", 1), 2, "no/where/at/all")


def test_damaged_weights(halve: Halve, tiny_model: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5_000])
    refused(halve("prune", "--model", damaged, "--layers", 2, "--out", "pruned"), 2, "safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 7}, "missing model.language_model.layers.6."),
        ({"num_hidden_layers": 5}, "unexpected model.language_model.layers.5."),
        ({"vocab_size": 600}, "lm_head.weight (512 x 64 stored, 600 x 64 by the config)"),
    ],
)
def test_config_and_weights_that_disagree(
    changes: dict[str, int], named: str, halve: Halve, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= changes
    config["text_config"].pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    soundfile.write(tmp_path / "clip.wav", tiny.tone(1.0, 3), 16_000)
    for command in (
        ("prune", "--model", model, "--layers", 2, "--out", "pruned"),
        ("translate", "--model", model, "--lang", "de", "clip.wav"),
    ):
        refused(halve(*command), 2, "config and weights disagree", named, "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.wav", "model"]


def test_plan_of_another_model(
    halve: Halve, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    other = tiny.make_model(tmp_path / "other", seed=5)
    search = ("--remove", 1, "--lang", "de", "--method", "middle", "--out", "found")
    done = halve("importance", "--model", other, "--corpus", tiny_corpus, *search)
    assert done.returncode == 0, done.stderr
    done = halve("prune", "--model", tiny_model, "--plan", "found/plan.json", "--out", "pruned")
    refused(done, 2, "another model")
    assert not (tmp_path / "pruned").exists()


def test_unknown_architecture(halve: Halve, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "walrus"}')
    done = halve("prune", "--model", model, "--layers", 1)
    refused(done, 2, "'walrus'", *FAMILIES, "halve/families/", "docs/add-a-family.md")
    refused(halve("plan", "--model", model, "--budget", "4GB"), 2, "'walrus'")
    (model / "config.json").write_text("{")
    refused(halve("plan", "--model", model, "--budget", "4GB"), 2, "config.json", "not JSON")


def test_configs_that_contradict_themselves(halve: Halve, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 8
    (model / "config.json").write_text(json.dumps(config))
    sound = tmp_path / "tone.wav"
    soundfile.write(sound, tiny.tone(1.0, 3), 16_000)
    done = halve("prune", "--model", model, "--layers", 2, "--out", "pruned")
    refused(done, 2, "config.json contradicts itself", "(8)")
    refused(halve("translate", "--model", model, "--lang", "de", sound), 2, "contradicts itself")
    config.pop("text_config")
    (model / "config.json").write_text(json.dumps(config))
    refused(halve("inspect", model), 2, "config.json", "text_config")
    (model / "config.json").write_text("[]")
    refused(halve("inspect", model), 2, "config.json", "no settings")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tone.wav"}


def test_settings_that_make_no_sense(
    halve: Halve, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    data = ("--model", tiny_model, "--corpus", tiny_corpus, "--lang", "de", "--out", "made")
    refused(halve("package", *data, "--parity-segments", 0), 2, "--parity-segments", "found 0")
    refused(halve("package", *data, "--block-size", 7), 2, "--block-size", "16, 32")
    refused(halve("tune", *data, "--learning-rate", "inf"), 2, "--learning-rate", "finite")
    refused(halve("distill", *data, "--dtype", "float8"), 2, "--dtype")
    refused(halve("distill", *data, "--device", "tpu"), 2, "'tpu'", "cpu, cuda")
    refused(halve("random-name", *data), 2, "random-name")
    refused(halve("importance", *data, "--remove", 1, "--seed", -1), 2, "--seed")
    place = ("merge", "--model", tiny_model, "--out", "made", "--adapter")
    refused(halve(*place, tmp_path), 2, "neither an adapter nor a model")
    refused(halve(*place, tmp_path / "gone"), 2, "gone", "no directory")
    sound = ("translate", "--model", tiny_model, "--lang", "de", "--input-dir", tmp_path, "x.wav")
    refused(halve(*sound), 2, "--input-dir", "--segments")
    corpus = ("corpus", tiny_corpus, "--format", "halve", "--out", "made")
    refused(halve(*corpus, "--select-share", 0.5, "--test-share", 0.5), 2, "nothing to train on")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "halve-test", str(place)]
    if (
        os.geteuid() != 0
        or subprocess.run(command, capture_output=True, check=False).returncode != 0
    ):
        pytest.skip("needs root and mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk(halve: Halve, tiny_model: Path, mounted: Path) -> None:
    done = halve("prune", "--model", tiny_model, "--layers", 2, "--out", mounted / "pruned")
    refused(done, 1, "full")
    assert list(mounted.iterdir()) == []


def test_read_only_place(halve: Halve, tiny_model: Path, mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    done = halve("prune", "--model", tiny_model, "--layers", 2, "--out", mounted / "pruned")
    refused(done, 1, "read-only", "--out")


def test_place_taken(halve: Halve, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("dear")
    done = halve("prune", "--model", tiny_model, "--layers", 2, "--out", "letters")
    refused(done, 2, "letters is in the way")
    assert (tmp_path / "letters" / "love.txt").read_text() == "dear"
