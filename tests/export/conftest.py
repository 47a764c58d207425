"""A tuned adapter, its student and the student's packages, each made once."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from halve.models import load_model
from tests import tiny


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def adapter(workshop: Path, tiny_model: Path) -> Path:
    """A rank-stabilised LoRA adapter on the decoder's linear layers that changes every one of them."""
    speech = load_model(tiny_model)
    settings = LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        exclude_modules=r".*(audio_tower|multi_modal_projector|lm_head).*",
    )
    model = get_peft_model(speech.model, settings)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(workshop / "adapter")
    return workshop / "adapter"


@pytest.fixture(scope="session")
def student(
    workshop: Path, tiny_model: Path, adapter: Path, tiny_corpus: Path, clips: list
) -> Path:
    """A bfloat16 student that ends some of its translations itself, none before its fourth token.

    A random model never says the end token: two tokens that it says often are declared more of them.
    """
    path = workshop / "student"
    run_merge(MergeConfig(onto="base"), tiny_model, adapter, None, path)
    from halve.corpus import read_corpus
    from halve.translate import TorchTranslator

    corpus = read_corpus(tiny_corpus)
    heard = [corpus.audio(segment) for segment in corpus.split("select")] + clips
    rows = TorchTranslator(load_model(path)).translate(heard, "de")
    early = {token for row in rows for token in row.tokens[:3]}
    said = [set(row.tokens[3:]) - early for row in rows]
    often = sorted(
        set().union(*said), key=lambda token: (-sum(token in row for row in said), token)
    )
    (path / "artefact.json").unlink()
    settings = json.loads((path / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], *often[:2]]
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def packages(workshop: Path, student: Path, tiny_corpus: Path) -> dict[str, Path]:
    """An ONNX package in each precision."""
    made = {}
    for precision in ("fp32", "int8", "int4"):
        config = PackageConfig(target="onnx", precision=precision, max_drop=100.0)
        made[precision] = run_package(
            config, student, tiny_corpus, workshop / f"onnx-{precision}"
        ).path
    return made


@pytest.fixture(scope="session")
def clips() -> list:
    return [
        tiny.tone(duration_s, index) for index, duration_s in enumerate((0.7, 2.2, 0.4, 1.3, 0.9))
    ]
