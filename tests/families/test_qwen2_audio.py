"""What only Qwen2-Audio has: released configs that leave most to the class, and the paper's model at full size."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, Qwen2AudioConfig

from compress.config import PruneConfig
from compress.prune import run_prune
from halve.families import FAMILIES, Counts, family_for, released_config
from halve.languages import language
from halve.models import load_model, read_config
from halve.translate import TorchTranslator
from tests import tiny
from tests.families.omni_models import make_omni

FAMILY = FAMILIES["qwen2_audio"]
ID = "Qwen/Qwen2-Audio-7B-Instruct"
SPARSE: dict[str, Any] = {
    "model_type": "qwen2_audio",
    "audio_config": {"num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32},
    "text_config": {"model_type": "qwen2", "vocab_size": 156_032, "intermediate_size": 11_008},
}
"""As the hub's config.json: neither the decoder's layers nor its width are in it."""


def counts_of_the_class(config: dict[str, Any]) -> int:
    """Parameters of the stock class on the meta device."""
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(Qwen2AudioConfig(**copy.deepcopy(config)))
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("layers", "changes", "total"),
    [
        (32, {}, 8_397_094_912),
        (24, {}, 6_777_929_728),
        (16, {}, 5_158_764_544),
        (24, {"vocab_size": 32_000}, None),
        (5, {"vocab_size": 640, "num_key_value_heads": 8}, None),
    ],
)
def test_parameters_at_full_size_are_those_of_the_class(
    layers: int, changes: dict[str, int], total: int | None
) -> None:
    explicit = released_config(ID)
    assert explicit is not None
    found: list[Counts] = []
    for config in (explicit, copy.deepcopy(SPARSE)):
        config["text_config"] |= changes
        pruned = FAMILY.kept_config(config, range(layers))
        found.append(FAMILY.count_parameters(pruned))
        assert FAMILY.num_layers(pruned) == found[-1].decoder_layers == layers
        assert found[-1].total == counts_of_the_class(pruned)
    assert found[0] == found[1]
    assert total in (None, found[0].total)


def test_a_released_config_is_a_copy() -> None:
    first, second = released_config(ID), released_config(ID)
    assert first is not None and second is not None
    first["text_config"]["vocab_size"] = 1
    assert second["text_config"]["vocab_size"] == 156_032
    assert family_for(second) is FAMILY
    assert released_config("someone/else") is None


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni"])
@pytest.mark.parametrize("lists", [True, False])
def test_pruning_leaves_each_layer_its_window(name: str, lists: bool, tmp_path: Path) -> None:
    make = tiny.make_model if name == "qwen2_audio" else make_omni
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    teacher = make(tmp_path / "teacher", **windows)
    config = read_config(teacher)
    if not lists:
        del config["text_config"]["layer_types"]
        (teacher / "config.json").write_text(json.dumps(config), encoding="utf8")
    run_prune(PruneConfig(layers=(1, 2), verify="full"), teacher, None, tmp_path / "pruned")
    kinds = []
    for path in (teacher, tmp_path / "pruned"):
        speech = load_model(path)
        assert speech.family.name == name
        kinds.append(list(speech.part(speech.family.decoder).config.layer_types))
    assert kinds[0] == ["full_attention"] * 3 + ["sliding_attention"] * 3
    assert kinds[1] == [kinds[0][layer] for layer in (0, 3, 4, 5)]


def test_windows_that_a_config_leaves_to_the_class_are_written_out() -> None:
    shape: dict[str, Any] = {"num_hidden_layers": 32, "use_sliding_window": True}
    for settings in (shape, {**shape, "sliding_window": None}, {**shape, "max_window_layers": 30}):
        before = Qwen2AudioConfig(text_config={"model_type": "qwen2", **settings}).text_config
        pruned = FAMILY.kept_config({"text_config": settings}, range(8, 32))
        after = Qwen2AudioConfig(text_config={"model_type": "qwen2", **pruned["text_config"]})
        assert after.text_config.layer_types == before.layer_types[8:]
        assert after.text_config.sliding_window == before.sliding_window


def test_a_config_that_leaves_layers_to_the_class_is_pruned(tmp_path: Path) -> None:
    settings = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    teacher = tiny.make_model(tmp_path / "teacher", hidden_size=128, **settings)
    config = read_config(teacher)
    for key in (*settings, "layer_types"):
        config["text_config"].pop(key, None)
    (teacher / "config.json").write_text(json.dumps(config), encoding="utf8")
    made = run_prune(PruneConfig(layers=(3, 20), verify="full"), teacher, None, tmp_path / "pruned")
    assert read_config(made.path)["text_config"]["num_hidden_layers"] == 30
    speech = load_model(made.path)
    assert len(speech.part(FAMILY.layers)) == 30
    asked = FAMILY.instruction(language("de"))
    inputs = FAMILY.stock_inputs(speech.processor, tiny.tone(1.1, 4), asked, torch.float32)
    said = FAMILY.stock_generate(speech.model, inputs, max_new_tokens=6)
    row = TorchTranslator(speech).translate([tiny.tone(1.1, 4)], "de", limits=[6])[0]
    assert row.tokens == said[: len(row.tokens)] and len(said) - len(row.tokens) <= 1
