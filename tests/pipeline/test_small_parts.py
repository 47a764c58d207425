"""Budgets, cuts of long audio, and words for numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from halve.errors import InputError
from pipeline import budget, console
from pipeline.translate import cut_in_silence


def test_a_budget_takes_the_most_layers_that_fit(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    everything = budget.choices(config, 1e9)
    assert {choice.layers for choice in everything} == {6}
    assert everything[0].stored_bytes <= 1e9
    tight = {choice.package: choice for choice in budget.choices(config, 800e3)}
    assert 2 <= tight["checkpoint bf16"].layers < 6
    assert tight["onnx int4"].layers == 6
    assert all(choice.stored_bytes <= 800e3 for choice in tight.values())
    with pytest.raises(InputError, match="fits"):
        budget.plan(str(tiny_model), "100kB", "de")


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
