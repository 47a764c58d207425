"""Budgets, cuts of long audio, and words for numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from export.config import PackageConfig
from export.package import run_package
from halve.errors import InputError
from pipeline import budget, console
from pipeline.recipe import read_recipe
from pipeline.translate import cut_in_silence
from tests import tiny


def test_a_budget_takes_the_most_layers_that_fit(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    everything = budget.choices(config, 1e9)
    assert {choice.layers for choice in everything} == {6}
    assert everything[0].package == "checkpoint bf16"  # nothing is lost where all fits
    tight = {choice.package: choice for choice in budget.choices(config, 1.2e6)}
    assert 2 <= tight["onnx int8"].layers <= tight["onnx int4"].layers == 6
    assert all(choice.stored_bytes <= 1.2e6 for choice in tight.values())
    with pytest.raises(InputError, match=r"fits.*two layers in the smallest form take"):
        budget.plan(str(tiny_model), "100kB", "de")


def test_what_a_search_measured_ranks_the_choices(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    steep = budget.Table("chrf++", (40.0, 20.0, 10.0))
    small = 1.2e6
    ranked = budget.choices(config, small, measured=steep)
    scores = [choice.score for choice in ranked if choice.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert ranked[0].layers == 6  # quantised further rather than pruned
    beyond = [choice for choice in ranked if choice.score is None]
    assert ranked[-len(beyond) :] == beyond or not beyond


@pytest.mark.parametrize(("precision", "target"), [("int4", "onnx"), ("bf16", "checkpoint")])
def test_sizes_are_those_of_real_packages(precision: str, target: str, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", hidden_size=256, intermediate_size=768)
    config = json.loads((model / "config.json").read_text())
    settings = PackageConfig.model_validate(
        {"target": target, "precision": precision, "langs": ["de"], "quantise": "rtn"}
    )
    run_package(settings, model, None, tmp_path / "package")
    real = sum(p.stat().st_size for p in (tmp_path / "package").rglob("*") if p.is_file())
    found = budget.choices(config, 1e9, budget._side_bytes(model))
    computed = next(one for one in found if one.settings["precision"] == precision)
    graphs = budget.GRAPH_BYTES if target == "onnx" else 0
    assert computed.stored_bytes == pytest.approx(real, abs=graphs + 0.1 * real)


def test_a_choice_becomes_a_recipe(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    given = (str(tiny_model), "1.2MB", "de", None, tiny_corpus)
    made = budget.plan(*given, choice=2, write=recipe)
    assert "trimmed" in made.text
    chosen = made.data["choices"][1]
    read = read_recipe(recipe)
    assert read.packages[0].target == chosen["settings"]["target"]
    removed = read.importance.remove if read.importance else 0
    assert removed == 6 - chosen["layers"]
    with pytest.raises(InputError, match="is there already"):
        budget.plan(*given, write=recipe)
    with pytest.raises(InputError, match="no choice 99"):
        budget.plan(*given, choice=99, write=tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("4GB", 4e9), ("500 MB", 5e8), ("1.5GiB", 1.5 * 2**30), ("12", 12)]
)
def test_sizes_are_read(text: str, size_bytes: float) -> None:
    assert budget.parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "much", "4 apples", "1.2.3GB"])
def test_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        budget.parse_bytes(text)


def test_long_audio_is_cut_where_it_is_silent() -> None:
    rate = 1000
    audio = np.random.default_rng(0).normal(0, 1, 65 * rate).astype(np.float32)
    audio[25 * rate : 26 * rate] = 0
    parts = cut_in_silence(audio, 30.0, rate)
    assert np.array_equal(np.concatenate(parts), audio)
    assert all(len(part) <= 30 * rate for part in parts)
    assert 25 * rate <= len(parts[0]) <= 26 * rate
    assert len(cut_in_silence(audio[: 30 * rate], 30.0, rate)) == 1


def test_numbers_in_words() -> None:
    assert [console.duration(s) for s in (5, 120, 7200, 9e5)] == [
        "5 s",
        "2 min",
        "2.0 h",
        "10.4 days",
    ]
    assert [console.size(b) for b in (7, 2e3, 3.5e6, 4e9)] == [
        "7 bytes",
        "2.0 kB",
        "3.5 MB",
        "4.0 GB",
    ]
