"""What releases of text models do differently: reasoning, dates, ends of turns, layouts that ONNX does not know."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.config import PruneConfig
from compress.prune import run_prune
from compress.rows import end_token
from export.config import PackageConfig, check_family
from export.package import run_package
from halve.errors import FamilyError
from halve.families import FAMILIES, family_for
from halve.models import load_model, load_processor, read_config
from halve.progress import SILENT
from pipeline import stages
from pipeline.budget import choices
from pipeline.recipe import read_recipe
from pipeline.stages import Run
from tests import tiny
from tests.families.text_models import make_model

THINKS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today Date: {{ date_string }} or {{ strftime_now('%Y-%m-%d') }}\n"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def asked_with(path: Path, model: Path, template: str) -> str:
    """The prompt of a copy of a model that has another chat template."""
    shutil.copytree(model, path)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    family = family_for(read_config(path))
    return family.prompt_text(load_processor(path), "Translate:")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("plain") / "llama", "llama", mlp_bias=False, attention_bias=False
    )


def test_a_model_that_can_reason_is_asked_not_to(plain: Path, tmp_path: Path) -> None:
    asked = asked_with(tmp_path / "qwen3", plain, THINKS)
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_prompt_is_the_same_tomorrow(plain: Path, tmp_path: Path) -> None:
    asked = asked_with(tmp_path / "dated", plain, DATED)
    assert asked.startswith("Today Date: 26 Jul 2024 or 2024-07-26\n")


def test_a_translation_ends_as_a_turn_of_the_template_does(plain: Path, tmp_path: Path) -> None:
    speech = load_model(plain)
    im_end = speech.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = speech.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    speech.model.generation_config.eos_token_id = [other, im_end]
    speech.processor.tokenizer.eos_token = "<|endoftext|>"
    assert speech.processor.tokenizer.eos_token_id == other
    assert end_token(speech) == im_end, "what the template ends a turn with"
    template = speech.processor.tokenizer.chat_template
    speech.processor.tokenizer.chat_template = None
    assert end_token(speech) == other, "without one, the tokenizer's own"
    speech.processor.chat_template = template
    assert end_token(speech) == im_end, "as older releases have it"
    assert speech.processor.tokenizer.chat_template is None


def test_stored_rotary_frequencies_are_left_behind(plain: Path, tmp_path: Path) -> None:
    """As Llama 2's releases have them."""
    old = shutil.copytree(plain, tmp_path / "llama2")
    tensors = load_file(old / "model.safetensors")
    for layer in range(6):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    made = run_prune(PruneConfig(layers=(2,), verify="full"), old, None, tmp_path / "pruned")
    stored = load_file(made.path / "model.safetensors")
    assert not [key for key in stored if "rotary" in key]
    config = PackageConfig(target="onnx", precision="fp32", langs=("de",))
    assert run_package(config, old, None, tmp_path / "package").kind == "package"


UNLIKE = [
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "llama3"),
    ("mistral", {}, "window of 24"),
    ("llama", {}, "biases"),
    ("qwen2", {}, "sliding_attention"),
    ("qwen3", {}, "type qwen3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "said"), UNLIKE)
def test_a_plan_offers_no_package_that_would_be_refused(
    kind: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    plain = {"mlp_bias": False, "attention_bias": False} if "rope_parameters" in changes else {}
    model = make_model(tmp_path / "model", kind, **changes, **plain)
    config = read_config(model)
    assert said in family_for(config).unlike_onnx(config)
    found = choices(config, 10e9, 0.0, None, None)
    assert found and not [one for one in found if one.package.startswith("onnx")]
    wanted = PackageConfig(target="onnx", precision="fp32", langs=("de",))
    with pytest.raises(FamilyError, match=f"{said}.*cannot be written as ONNX"):
        run_package(wanted, model, None, tmp_path / "package")
    # In a recipe it is told before the search, not after it.
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "lang: de\nteacher: model\ncorpus: {source: corpus, format: text}\nprune: {layers: [1]}\n"
        "packages: [{target: onnx, precision: fp32}]\n"
    )
    (tmp_path / "corpus").mkdir()
    run = Run(read_recipe(recipe), tmp_path / "run")
    with pytest.raises(FamilyError, match=said):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()


def test_layers_below_the_window_s_are_plain(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "qwen2", max_window_layers=6)
    config = read_config(model) | {"layer_types": None}
    assert family_for(config).has_onnx(config)


def test_why_a_family_has_no_onnx_is_told() -> None:
    family = FAMILIES["whisper"]
    for target in ("onnx", "gguf"):
        wanted = PackageConfig(target=target, precision="int4", langs=("de",))
        with pytest.raises(FamilyError, match="attend to an encoder"):
            check_family(wanted, family, {})


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_plan_knows_that_a_tied_table_is_stored_twice(precision: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 40_000}
    model = make_model(
        tmp_path / "qwen2", "qwen2", tie_word_embeddings=True, use_sliding_window=False, **shape
    )
    config = PackageConfig(target="onnx", precision=precision, langs=("de",))
    made = run_package(config, model, None, tmp_path / "package").path
    stored = sum(path.stat().st_size for path in made.iterdir() if path.name != "tokenizer.json")
    found = {one.package: one for one in choices(read_config(model), 1e9) if one.layers == 2}
    assert found[f"onnx {precision}"].stored_bytes == pytest.approx(stored, rel=0.15)


def test_ids_outside_of_the_vocabulary_forbid_nothing(plain: Path) -> None:
    speech = load_model(plain)
    speech.model.generation_config.suppress_tokens = [-1, 3, 512]
    assert speech.family.suppressed(speech.model)[0] == (3,)
