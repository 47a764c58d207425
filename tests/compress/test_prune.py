"""Pruning: what is written loads in stock transformers and computes what the sliced teacher computes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.config import PruneConfig
from compress.prune import check_contents, check_structure, plan_of_layers, read_plan, run_prune
from compress.reference import only_layers
from halve import artefact, shards
from halve.errors import ArtefactError, InputError
from halve.families import family_for
from halve.json_files import write_json
from halve.languages import language
from halve.models import load_model, read_config
from tests import tiny

STOCK = """
import sys
sys.modules["halve"] = sys.modules["compress"] = None
import numpy as np, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
model, info = AutoModelForMultimodalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32, local_files_only=True, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
processor = AutoProcessor.from_pretrained(sys.argv[1])
text = sys.argv[3]
inputs = processor(text=text, audio=np.load(sys.argv[2]), sampling_rate=16000, return_tensors="pt")
with torch.inference_mode():
    np.save(sys.argv[4], model.eval()(**inputs).logits.numpy())
    print(model.generate(**inputs, max_new_tokens=4, do_sample=False).shape)
"""


def plan_file(path: Path, **changes: Any) -> Path:
    """A plan for the tiny model, changed."""
    plan = {"family": "qwen2_audio", "num_layers": 6, "removed": [4, 2], "kept": [0, 1, 3, 5]}
    write_json(path, {**plan, **changes})
    return path


def test_stock_transformers_loads_it_without_halve(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_file(tmp_path / "plan.json")
    pruned = run_prune(PruneConfig(verify="full"), tiny_model, plan, tmp_path / "pruned")
    assert pruned.extra["max_logit_difference"] < 1e-4
    assert artefact.verify(pruned.path) == []
    teacher = load_model(tiny_model)
    clip = tiny.tone(1.0, 3)
    np.save(tmp_path / "clip.npy", clip)
    prompt = teacher.family.instruction(language("de"))
    text = teacher.family.prompt_text(teacher.processor, prompt)
    found = tmp_path / "logits.npy"
    given = (pruned.path, tmp_path / "clip.npy", text, found)
    command = [sys.executable, "-c", STOCK, *map(str, given)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    inputs = teacher.family.stock_inputs(teacher.processor, clip, prompt, torch.float32)
    with torch.inference_mode(), only_layers(teacher.model, teacher.family, [0, 1, 3, 5]) as sliced:
        wanted = sliced(**inputs).logits.numpy()
    np.testing.assert_allclose(np.load(found), wanted, rtol=1e-4, atol=1e-4)
    config = read_config(pruned.path)
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["num_hidden_layers"] == 4


def test_layers_named_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    pruned = run_prune(PruneConfig(layers=(3, 1)), tiny_model, None, tmp_path / "pruned")
    assert pruned.extra["removed"] == [3, 1]
    before, after = _weights(tiny_model), _weights(pruned.path)
    for new, old in enumerate((0, 2, 4, 5)):
        for key in [key for key in before if f".layers.{old}." in key and "language_model" in key]:
            renamed = key.replace(f".layers.{old}.", f".layers.{new}.")
            assert torch.equal(after[renamed], before[key])


def test_a_model_pruned_twice_tells_both_removals(tiny_model: Path, tmp_path: Path) -> None:
    once = run_prune(PruneConfig(layers=(3, 1)), tiny_model, None, tmp_path / "once")
    twice = run_prune(PruneConfig(layers=(2,)), once.path, None, tmp_path / "twice")
    assert twice.extra["removed"] == [3, 1, 4] and twice.extra["kept"] == [0, 2, 5]
    assert twice.extra["num_layers"] == 6
    before, after = _weights(tiny_model), _weights(twice.path)
    for new, old in enumerate(twice.extra["kept"]):
        for key in [key for key in before if f".layers.{old}." in key and "language_model" in key]:
            assert torch.equal(
                after[key.replace(f".layers.{old}.", f".layers.{new}.")], before[key]
            )


def test_a_student_carries_nothing_that_would_weigh_or_mislead(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Other frameworks' weights stay behind, and so do settings under which stock `generate` says something else."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_model, teacher)
    foreign = (
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx_data",
        "pytorch_model.bin.index.json",
    )
    for name in foreign:
        (teacher / name).write_bytes(b"0" * 1000)
    settings = json.loads((teacher / "generation_config.json").read_text())
    settings |= {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "do_sample": True,
        "top_p": 0.9,
    }
    (teacher / "generation_config.json").write_text(json.dumps(settings))
    pruned = run_prune(PruneConfig(layers=(2,)), teacher, None, tmp_path / "pruned")
    assert not set(foreign) & {path.name for path in pruned.path.iterdir()}
    kept = json.loads((pruned.path / "generation_config.json").read_text())
    assert not {"repetition_penalty", "no_repeat_ngram_size", "top_p"} & set(kept)
    assert kept["do_sample"] is False
    assert kept["eos_token_id"] == settings["eos_token_id"]


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "whisper"}, "another model"),
        ({"num_layers": 12, "kept": [0, 1, 3, 5, 6, 7, 8, 9, 10, 11]}, "another model"),
        ({"kept": [0, 1, 3]}, "do not fit"),
        ({"kept": [0, 1, 5, 3]}, "do not fit"),
        ({"removed": [4, 4, 2]}, "do not fit"),
        ({"removed": [0, 1, 2, 3, 4, 5], "kept": []}, "do not fit"),
        ({"removed": "all"}, "no prune plan"),
        ({"model": "0" * 64}, "another model"),
    ],
)
def test_plans_that_do_not_fit(
    changes: dict[str, Any], says: str, tiny_model: Path, tmp_path: Path
) -> None:
    plan = plan_file(tmp_path / "plan.json", **changes)
    with pytest.raises(ArtefactError, match=says):
        run_prune(PruneConfig(), tiny_model, plan, tmp_path / "pruned")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("layers", [(), (6,), (-1,), (1, 1), (0, 1, 2, 3, 4, 5)])
def test_layers_that_cannot_go(layers: tuple[int, ...], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be removed"):
        run_prune(PruneConfig(layers=layers), tiny_model, None, tmp_path / "pruned")
    assert list(tmp_path.iterdir()) == []


def test_one_source_of_layers(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="either"):
        run_prune(PruneConfig(), tiny_model, None, tmp_path / "pruned")
    with pytest.raises(InputError, match="either"):
        plan = plan_file(tmp_path / "plan.json")
        run_prune(PruneConfig(layers=(1,)), tiny_model, plan, tmp_path / "pruned")


def test_damage_is_found(tiny_model: Path, tmp_path: Path) -> None:
    pruned = run_prune(PruneConfig(layers=(2,)), tiny_model, None, tmp_path / "pruned").path
    family = family_for(read_config(tiny_model))
    weights = _weights(pruned)
    key = next(key for key in weights if "layers.2.mlp" in key)
    weights[key] = weights[key] + 1
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    check_structure(tiny_model, pruned, family, [0, 1, 3, 4, 5])
    with pytest.raises(ArtefactError, match="contents differ"):
        check_contents(tiny_model, pruned, family, [0, 1, 3, 4, 5])
    del weights[key]
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match="missing"):
        check_structure(tiny_model, pruned, family, [0, 1, 3, 4, 5])


@pytest.mark.parametrize("at", [0.2, 0.999], ids=["header", "weights"])
def test_a_disk_that_keeps_other_bytes_is_found(
    at: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads files again: headers and sizes alone would not tell."""
    from halve.shard_writer import _HashedFile

    closing = _HashedFile.__exit__

    def spoil(self: _HashedFile, *error: Any) -> None:
        closing(self, *error)
        path = self._path
        before = path.stat()
        content = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(content[:8], "little")
        place = header - 1 if at < 0.5 else int(at * len(content))  # a header ends in blanks
        content[place] = ord("\t") if at < 0.5 else content[place] ^ 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as no write would show

    monkeypatch.setattr(_HashedFile, "__exit__", spoil)
    with pytest.raises(ArtefactError, match=r"model\.safetensors: sha256 .* is read back"):
        run_prune(PruneConfig(layers=(2,)), tiny_model, None, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_a_plan_is_found_in_its_directory(tiny_model: Path, tmp_path: Path) -> None:
    plan_file(tmp_path / "plan.json", model=artefact.identity(tiny_model))
    config = read_config(tiny_model)
    plan = read_plan(tmp_path, family_for(config), config, tiny_model)
    assert plan.kept == (0, 1, 3, 5) and plan.removed == (4, 2)
    with pytest.raises(ArtefactError, match="no such file"):
        read_plan(tmp_path / "none.json", family_for(config), config)


@given(st.integers(2, 40), st.data())
def test_renumbering(total: int, data: Any) -> None:
    layers = data.draw(
        st.lists(st.integers(0, total - 1), min_size=1, max_size=total - 1, unique=True)
    )
    config: dict[str, Any] = {
        "model_type": "qwen2_audio",
        "text_config": {
            "num_hidden_layers": total,
            "layer_types": [f"kind-{layer}" for layer in range(total)],
            "max_window_layers": total,
        },
        "audio_config": {},
    }
    family = family_for(config)
    plan = plan_of_layers(layers, family, total)
    assert sorted(plan.kept + plan.removed) == list(range(total))
    new = family.kept_config(config, list(plan.kept))
    assert new["text_config"]["num_hidden_layers"] == len(plan.kept)
    assert new["text_config"]["layer_types"] == [f"kind-{layer}" for layer in plan.kept]
    assert new["tie_word_embeddings"] is False
    assert config["text_config"]["num_hidden_layers"] == total, "the teacher's config is left alone"
    keys = [f"{family.disk_layers}{layer}.mlp.weight" for layer in range(total)]
    renamed = [family.kept_key(key, plan.kept) for key in keys]
    assert [name for name in renamed if name] == keys[: len(plan.kept)]
    assert [layer for layer, name in enumerate(renamed) if name] == list(plan.kept)
    assert family.kept_key("audio_tower.layers.0.fc1.weight", plan.kept) is not None
    assert json.loads(json.dumps(new)) == new


@pytest.mark.parametrize("layers", [400, 10**9])
def test_a_config_of_countless_layers_is_refused_at_once(
    layers: int, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"].pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=rf"config\.json.*{layers:,} decoder layers"):
        run_prune(PruneConfig(layers=(2,)), model, None, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_plans_of_no_numbers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_file(tmp_path / "plan.json", removed=[math.inf])
    with pytest.raises(ArtefactError, match=r"plan\.json is no prune plan"):
        run_prune(PruneConfig(), tiny_model, plan, tmp_path / "pruned")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "which tensor"),
        ('{"weight_map": []}', "which tensor"),
        ('{"weight_map": {"a": 1}}', "which tensor"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside"),
    ],
)
def test_an_index_of_another_shape_is_named(
    text: str, says: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    # Beside a whole file stock code does not read it.
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / shards.INDEX).write_text(text)
    with pytest.raises(ArtefactError, match=rf"index\.json is damaged .*{says}"):
        run_prune(PruneConfig(layers=(2,)), model, None, tmp_path / "pruned")


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_damaged_generation_config_is_named(text: str, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_config.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"generation_config\.json"):
        run_prune(PruneConfig(layers=(2,)), model, None, tmp_path / "pruned")
    with pytest.raises(ArtefactError, match=r"generation_config\.json"):
        load_model(model)
