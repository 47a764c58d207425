"""Gemma 3 with an image tower goes the road of a text model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    SiglipVisionConfig,
)

from compress.config import PruneConfig, TuneConfig
from compress.exact import ExactTranslator
from compress.importance import make_task
from compress.prune import run_prune
from compress.reference import StockTranslator
from compress.tune import run_tune
from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from halve.corpus import read_corpus
from halve.errors import FamilyError
from halve.families import SourceText, family_for
from halve.models import load_model, read_config
from halve.sources import asked
from halve.translate import TorchTranslator
from tests import tiny
from tests.families.text_models import TEMPLATE, make_config, make_corpus


def gemma_config(**text: Any) -> Gemma3Config:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    # Stock code turns this head off in a Gemma 3 checkpoint's own config.
    vision.vision_use_head = False
    return Gemma3Config(
        text_config=make_config("gemma3_text", **text).to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
    )


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3") / "teacher"
    config = gemma_config()
    torch.manual_seed(4)
    model = Gemma3ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=0.04 if "o_proj" in name or "down_proj" in name else 0.15
            )
    text = config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "text", train=4, select=2, test=2)


def test_parameters_are_those_of_the_class(gemma: Path) -> None:
    for changes in ({}, {"num_hidden_layers": 3, "vocab_size": 640}):
        config = gemma_config(**changes)
        with torch.device("meta"):
            model = Gemma3ForConditionalGeneration(config)
        facts = config.to_dict()
        counts = family_for(facts).count_parameters(facts)
        assert counts.total == sum(weight.numel() for weight in model.parameters())
    facts = read_config(gemma)
    del facts["text_config"]["model_type"], facts["text_config"]["layer_types"]
    facts["text_config"] |= {"sliding_window_pattern": 3}
    kept = family_for(facts).kept_config(facts, [0, 2, 5])["text_config"]
    assert kept["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]


def test_a_pruned_model_says_in_stock_code_what_halve_says(gemma: Path, tmp_path: Path) -> None:
    run_prune(PruneConfig(layers=(1, 3), verify="full"), gemma, None, tmp_path / "pruned")
    translator = TorchTranslator(load_model(tmp_path / "pruned"))
    source = SourceText("open the new file")
    row = translator.translate([source], "de", limits=[12])[0]
    speech = translator.speech
    ids = speech.family.source_ids(speech.processor, asked(speech.family, "de", source), source)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "pruned")
    said = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert [
        token for token in said.tolist() if token != speech.family.end_ids(model)[0]
    ] == row.tokens
    kept = {name.split(".")[1] for name, _ in model.named_parameters()}
    assert "vision_tower" in kept, "stock code still finds its image tower"


def test_a_tied_head_that_is_stored_stays_behind(gemma: Path) -> None:
    config = read_config(gemma)
    family = family_for(config)
    for tied in (None, True, False):
        facts = config | {"tie_word_embeddings": tied}
        assert family.is_surplus(facts, "language_model.lm_head.weight") == (tied is not False)
        assert not family.is_surplus(facts, "language_model.model.embed_tokens.weight")


def test_exact_importance_is_the_reference(gemma: Path, corpus: Path) -> None:
    speech = load_model(gemma)
    data = read_corpus(corpus)
    task = make_task(speech, data, data.split("select", "de"), "de", "chrf++")
    task = replace(task, limits=(10, 12))
    found = []
    for translator in (
        StockTranslator(speech, task, deep_copy=False),
        ExactTranslator(speech, task),
    ):
        opened: Any = translator
        with opened:
            groups = opened.groups([2, 4, None])
            runs = opened.run(range(6), [[], []], groups, range(2))
            found.append({layer: tokens for one in runs for layer, tokens in one.items()})
    assert found[0] == found[1]


def test_qlora_merge_and_packages(gemma: Path, corpus: Path, tmp_path: Path) -> None:
    config = TuneConfig(
        langs=("de",), epochs=1, rank=4, alpha=8, learning_rate=1e-2, precision="float32",
        select_segments=0,
    )  # fmt: skip
    run_tune(config, gemma, corpus, None, tmp_path / "adapter")
    run_merge(MergeConfig(dtype="float32"), gemma, tmp_path / "adapter", None, tmp_path / "student")
    ids = torch.tensor([[5, 40, 77, 130]])
    with torch.inference_mode():
        merged, adapted, plain = (
            speech.model(ids).logits
            for speech in (
                load_model(tmp_path / "student"),
                load_model(gemma, adapter=tmp_path / "adapter"),
                load_model(gemma),
            )
        )
    assert (merged - adapted).abs().max() < 1e-3 < (merged - plain).abs().max()
    nf4 = PackageConfig(target="checkpoint", precision="nf4", langs=("de",), max_drop=100)
    assert run_package(nf4, tmp_path / "student", corpus, tmp_path / "nf4").extra["parity_passed"]
    onnx = PackageConfig(target="onnx", precision="fp32", langs=("de",))
    with pytest.raises(FamilyError, match="--target checkpoint"):
        run_package(onnx, tmp_path / "student", None, tmp_path / "onnx")
