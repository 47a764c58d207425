"""What only Qwen2.5-Omni has: a whole model that speaks, of which halve takes the thinker."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from compress.config import PruneConfig
from compress.prune import run_prune
from halve.errors import FamilyError
from halve.families import FAMILIES, family_for
from halve.models import load_model, read_config
from halve.shards import copy_side_files
from tests import tiny
from tests.families.omni_models import make_omni

FAMILY = FAMILIES["qwen2_5_omni"]
RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "7B": {},
    "3B": {
        "text_config": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        "audio_config": {"output_dim": 2048},
        "vision_config": {"out_hidden_size": 2048},
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_the_released_shapes(name: str) -> None:
    config = Qwen2_5OmniThinkerConfig(**RELEASED[name])
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config)
    count = sum(weight.numel() for weight in model.parameters())
    facts = {"model_type": "qwen2_5_omni_thinker", "text_config": {}, **RELEASED[name]}
    assert FAMILY.count_parameters(config.to_dict()).total == count
    assert FAMILY.count_parameters(facts).total == count


def test_pieces_of_a_clip_are_those_of_the_whole_window(tmp_path: Path) -> None:
    speech = load_model(make_omni(tmp_path / "thinker"))
    for duration_s in (0.39, 0.4, 0.41, 2.0, 30.0):
        clip = tiny.tone(duration_s, 3)
        inputs = FAMILY.stock_inputs(speech.processor, clip, "Translate:", torch.float32)
        found = speech.model.model.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"]
        )
        states = FAMILY.encode(speech.model, speech.processor, clip)
        assert torch.allclose(states, found.last_hidden_state, atol=1e-5), duration_s


def test_a_whole_model_says_how_to_save_its_thinker(tmp_path: Path) -> None:
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        make_omni(tmp_path / "thinker")
    )
    # Without the parts that speak, the class is the whole model's all the same.
    config = Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    model = Qwen2_5OmniForConditionalGeneration(config)
    model.thinker.load_state_dict(thinker.state_dict())
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(FamilyError, match="save its thinker by itself"):
        family_for(read_config(tmp_path / "whole"))
    advised = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "whole")
    noted = advised._weight_conversions
    advised._weight_conversions = None
    advised.save_pretrained(tmp_path / "advised")
    assert family_for(read_config(tmp_path / "advised")) is FAMILY
    assert all(
        torch.equal(weight, advised.state_dict()[key])
        for key, weight in thinker.state_dict().items()
    )
    copy_side_files(tmp_path / "thinker", tmp_path / "advised")
    made = run_prune(PruneConfig(layers=(2,)), tmp_path / "advised", None, tmp_path / "pruned")
    assert made.extra["removed"] == [2]
    # As stock code saves it where nobody says otherwise: the whole model's names.
    advised._weight_conversions = noted
    advised.save_pretrained(tmp_path / "prefixed")
    with pytest.raises(FamilyError, match=r"no stored tensor is called model\.layers"):
        run_prune(PruneConfig(layers=(2,)), tmp_path / "prefixed", None, tmp_path / "again")
