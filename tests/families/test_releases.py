"""What releases on the hub look like, and what halve makes of it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from halve import models, shards
from halve.errors import FamilyError
from halve.families import FAMILIES, family_for
from halve.models import load_processor
from halve.origin import origin
from tests.families.text_models import make_model

CARD = "---\nbase_model: [somebody/pretrained]\nlicense: mit\n---\n"


def test_a_release_of_the_hub_is_the_base_itself(tmp_path: Path) -> None:
    """An instruct release's card names what that was made from."""
    snapshot = tmp_path / "models--some--instruct" / "snapshots" / "0a1b"
    local = tmp_path / "tuned"
    for folder in (snapshot, local):
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(CARD)
    assert origin(snapshot) == {"base_model": "some/instruct", "license": "mit"}
    assert origin(local) == {"base_model": ["somebody/pretrained"], "license": "mit"}


def test_a_model_without_an_audio_encoder_is_refused_by_its_config() -> None:
    with pytest.raises(FamilyError, match="audio_config is null"):
        family_for({"model_type": "gemma4", "audio_config": None})
    assert family_for({"model_type": "gemma4", "audio_config": {}}) is FAMILIES["gemma4"]


def test_a_whole_file_goes_before_an_earlier_models_index(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / shards.INDEX).write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    (model / "model.safetensors.index.fp32.json").write_text("{}")
    assert set(shards.read_index(model).values()) == {"model.safetensors"}
    assert not {name for name in shards.copy_side_files(model, _new(tmp_path)) if "index" in name}


def _new(folder: Path) -> Path:
    (folder / "target").mkdir()
    return folder / "target"


@pytest.mark.parametrize(
    "names", [["model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]]
)
def test_weights_come_once(
    names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = {}

    def download(model: str, **patterns: list[str]) -> str:
        asked.update(patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, model: names)
    models.resolve_model("some/release-nobody-has")
    assert ("*.bin" in asked["ignore_patterns"]) == ("model.safetensors" in names)
    assert "consolidated*.safetensors" in asked["ignore_patterns"]


def test_a_template_without_plain_text_is_refused_in_words(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    wants = (
        "{% if messages[0].content is string %}{{ raise_exception('give me a list') }}{% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": wants}))
    (model / "chat_template.jinja").write_text(wants)
    with pytest.raises(FamilyError, match=r"takes no plain text \(give me a list\)"):
        FAMILIES["text"].prompt_text(load_processor(model), "Translate:")


def test_names_of_another_class_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {f"thinker.{key}": value for key, value in tensors.items()}, model / "model.safetensors"
    )
    with pytest.raises(FamilyError, match="no stored tensor is called language_model"):
        FAMILIES["qwen2_audio"].check_stored(model, shards.tensor_shapes(model))
