"""The benchmark at the true size, run on a shape that fits a processor."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import full_size
from benchmarks.big_checkpoint import config_of
from halve.json_files import read_json


def small(layers: int) -> dict[str, Any]:
    config = config_of(layers)
    config["audio_config"] |= {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
    }
    config["text_config"] |= {
        "vocab_size": 8000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    return config


@pytest.fixture(autouse=True)
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "config_of", small)


def test_both_searches_are_timed_and_find_the_same(tmp_path: Path) -> None:
    asked = [
        "search",
        "--layers",
        "5",
        "--segments",
        "4",
        "--sample",
        "2",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--out",
    ]
    assert full_size.main([*asked, str(tmp_path)]) == 0
    found = read_json(tmp_path / "search.json")
    assert found["candidates"] == 3 and found["segments"] == 4
    assert found["same_as_reference"] == 1.0
    assert found["candidates_of_8_rounds"] == sum(range(1, 4)), "no more layers go than may"
    assert found["exact_s_per_candidate"] > 0 and found["reference_s_per_candidate"] > 0
    assert 0 <= found["kept_of_drafts"] <= 1


def test_qlora_takes_its_steps(tmp_path: Path) -> None:
    asked = [
        "tune",
        "--layers",
        "3",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--out",
    ]
    assert full_size.main([*asked, str(tmp_path), "--work-dir", str(tmp_path)]) == 0
    found = read_json(tmp_path / "tune.json")
    assert found["steps"] == 2 and found["trainable_parameters"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tune.json"], "nothing is left"
