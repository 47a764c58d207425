"""What of a model counts as what: layers that the search takes apart, parts that see, copies that nobody reads."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from compress.config import PruneConfig, TeachConfig, TuneConfig
from compress.layers import _has_parts
from compress.loop import _optimizer
from compress.prune import run_prune
from compress.teach import carried, run_teach, select_weights
from compress.tune import run_tune
from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from halve import environment
from halve.errors import ArtefactError
from halve.models import load_model
from halve.shards import tensor_shapes
from tests.families import text_models
from tests.families.gemma_models import make_gemma4
from tests.families.omni_models import make_omni


@pytest.mark.parametrize(
    ("model_type", "is_known"), [("llama", True), ("qwen2", True), ("qwen3", False)]
)
def test_only_layers_of_the_known_shape_are_put_together_anew(
    model_type: str, is_known: bool, tmp_path: Path
) -> None:
    """In 16 bits a probe does not see the norms of queries and keys, which Qwen3 has."""
    speech = load_model(text_models.make_model(tmp_path / "m", model_type), dtype="bfloat16")
    assert _has_parts(speech.part(speech.family.layers)[0]) is is_known


@pytest.mark.parametrize("make", [make_gemma4, make_omni])
def test_parts_that_see_are_not_trained(make: Any, tmp_path: Path) -> None:
    speech = load_model(make(tmp_path / "m"))
    seeing = [
        name
        for name, _ in speech.model.named_parameters()
        if any(word in name for word in ("vision", "visual"))
    ]
    weights, _ = select_weights(speech, freeze_audio=True)
    assert seeing and not set(seeing) & set(weights)
    assert any(".layers." in name for name in weights)


def test_a_tied_head_stored_twice_is_packaged_once(tmp_path: Path) -> None:
    model = text_models.make_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    corpus = text_models.make_corpus(tmp_path / "corpus")
    for precision in ("bf16", "nf4"):
        config = PackageConfig(target="checkpoint", precision=precision, langs=("de",))
        run_package(config, model, None, tmp_path / precision)
        assert "lm_head.weight" not in tensor_shapes(tmp_path / precision)
    config = TuneConfig(langs=("de",), method="full", max_steps=1, select_segments=0)
    run_tune(config, model, corpus, None, tmp_path / "student")
    run_merge(MergeConfig(), model, tmp_path / "student", None, tmp_path / "merged")
    load_model(tmp_path / "merged")


def test_a_head_of_its_own_under_a_config_that_ties_it_is_not_lost(tmp_path: Path) -> None:
    model = text_models.make_model(tmp_path / "m", "llama", tie_word_embeddings=True)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    for precision in ("bf16", "nf4"):
        config = PackageConfig(target="checkpoint", precision=precision, langs=("de",))
        with pytest.raises(ArtefactError, match="two different tables are stored"):
            run_package(config, model, None, tmp_path / precision)
    with pytest.raises(ArtefactError, match="two different tables are stored"):
        run_merge(MergeConfig(), model, model, None, tmp_path / "merged")


def test_what_was_removed_stays_on_record(tmp_path: Path) -> None:
    model = text_models.make_model(tmp_path / "m", "llama")
    corpus = text_models.make_corpus(tmp_path / "corpus")
    run_prune(PruneConfig(layers=(2, 3)), model, None, tmp_path / "pruned")
    config = TeachConfig(langs=("de",), max_steps=1, select_segments=0)
    taught = run_teach(config, tmp_path / "pruned", corpus, tmp_path / "taught")
    assert taught.extra["removed"] == [2, 3] and taught.extra["kept"] == [0, 1, 4, 5]
    assert carried(model) == {}


def test_norms_do_not_decay_whatever_their_shape(tmp_path: Path) -> None:
    speech = load_model(text_models.make_model(tmp_path / "m", "cohere"))
    weights, projector = select_weights(speech, freeze_audio=True)
    names = {id(each): name for name, each in weights.items()}
    config = TeachConfig(langs=("de",), weight_decay=0.1)

    class Training:
        pass

    training: Any = Training()
    training.config, training.weights, training.projector = config, weights, projector
    for group in _optimizer(training).param_groups:
        for parameter in group["params"]:
            is_norm = "norm" in names[id(parameter)]
            assert (group["weight_decay"] == 0.0) == (is_norm or parameter.dim() < 2)


def test_memory_is_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    found = []
    for names in (("none", "absent"), ("none", "limit")):
        places = tuple(str(tmp_path / name) for name in names)
        monkeypatch.setattr(environment, "_MEMORY_LIMITS", places)
        found.append(environment.memory_bytes())
    assert found[0] > found[1] == 1_000_000
