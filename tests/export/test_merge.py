"""A merged student computes what its model with the adapter on computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM

from compress.config import PruneConfig
from compress.prune import run_prune
from export import merge, nf4
from export.adapter import read_adapter
from export.config import MergeConfig
from export.contest import techniques
from export.merge import run_merge
from halve import artefact
from halve.card import stored_bytes
from halve.errors import ArtefactError, InputError
from halve.families import family_for
from halve.models import load_model, read_config
from halve.origin import read_head
from halve.shards import iter_stored, tensor_shapes
from halve.translate import TorchTranslator
from pipeline import steps
from tests import tiny
from tests.compress.damage import spoilt
from tests.families import text_models


def logits(speech) -> torch.Tensor:
    translator = TorchTranslator(speech)
    with torch.inference_mode():
        inputs = translator.inputs(translator.encode_all([tiny.tone(1.0, 1)])[0], "de")[None]
        hidden = speech.part(speech.family.decoder)(inputs_embeds=inputs).last_hidden_state
        return speech.part(speech.family.head)(hidden).float()


def test_onto_base_equals_adapter_on(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    run_merge(MergeConfig(onto="base", dtype="float32"), tiny_model, adapter, None, tmp_path / "s")
    on = logits(load_model(tiny_model, adapter=adapter))
    merged = logits(load_model(tmp_path / "s"))
    assert (on - merged).abs().max() < 1e-4
    assert (on - logits(load_model(tiny_model))).abs().max() > 0.1, "the adapter changes something"


def on_record(adapter: Path, out: Path, model: Path, **facts: Any) -> Path:
    """An adapter as `halve tune` leaves it: with a record of the model that it was tuned on."""
    with artefact.writing(out, "adapter", {"langs": ["de"]}, 0, {"model": model}) as draft:
        for file in adapter.iterdir():
            shutil.copyfile(file, draft.path / file.name)
        draft.extra = facts
    return out


def test_the_mean_of_several_adapters_is_that_of_their_students(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    """The second adds three times as much, and nothing to one layer."""
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    tensors = {
        key: 3 * value if "lora_B" in key else value
        for key, value in tensors.items()
        if ".layers.1." not in key
    }
    save_file(tensors, other / "adapter_model.safetensors")
    config = MergeConfig(dtype="float32")
    for name, first, others in (("a", adapter, ()), ("b", other, ()), ("mean", adapter, [other])):
        made = run_merge(config, tiny_model, first, None, tmp_path / name, others=others)
    assert (
        made.extra["mean_of"] == 2 and "mean of 2 adapters" in (made.path / "README.md").read_text()
    )
    one, two, mean = (
        load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "mean")
    )
    assert any(not torch.equal(one[key], two[key]) for key in one)
    for key, value in mean.items():
        assert torch.allclose(value, (one[key] + two[key]) / 2, atol=1e-6), key
    with pytest.raises(InputError, match="one is a whole model"):
        run_merge(config, tiny_model, adapter, None, tmp_path / "c", others=[tiny_model])
    step = steps.merge(config, tiny_model, adapter, None, tmp_path / "mean", [other])
    assert steps.up_to_date(step)
    assert not steps.up_to_date(steps.merge(config, tiny_model, adapter, None, tmp_path / "mean"))


def test_the_mean_of_whole_models(tmp_path: Path, tiny_model: Path, adapter: Path) -> None:
    """Of the model that they started from too, and however each is stored."""
    plain = MergeConfig(dtype="float32")
    tuned = run_merge(plain, tiny_model, adapter, None, tmp_path / "merged").path
    (tuned / "artefact.json").unlink()
    half = run_merge(MergeConfig(), tiny_model, adapter, None, tmp_path / "half").path
    (half / "artefact.json").unlink()
    made = run_merge(plain, tiny_model, tiny_model, None, tmp_path / "mean", others=[tuned, half])
    assert made.extra["mean_of"] == 3
    assert "mean of 3 models" in (made.path / "README.md").read_text()
    several = [load_file(each / "model.safetensors") for each in (tiny_model, tuned, half)]
    mean = load_file(made.path / "model.safetensors")
    assert any(not torch.equal(several[0][key], several[1][key]) for key in mean)
    for key, value in mean.items():
        expected = torch.stack([each[key].float() for each in several]).mean(0)
        assert torch.allclose(value, expected, atol=1e-6), key
    load_model(made.path)
    other = run_prune(PruneConfig(layers=(1,)), tiny_model, None, tmp_path / "pruned").path
    with pytest.raises(ArtefactError, match="differ in language_model"):
        run_merge(plain, other, other, None, tmp_path / "no", others=[tuned])


def test_the_mean_of_models_of_which_one_holds_a_second_head(tmp_path: Path) -> None:
    """As releases do whose table is tied: what stock code does not read is no difference."""
    base = text_models.make_model(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    tuned = shutil.copytree(base, tmp_path / "tuned")
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, base / "model.safetensors", {"format": "pt"})
    changed = {key: value + 0.5 for key, value in tensors.items()}
    save_file(changed, tuned / "model.safetensors", {"format": "pt"})
    config = MergeConfig(dtype="float32")
    made = run_merge(config, base, base, None, tmp_path / "mean", others=[tuned])
    mean = load_file(made.path / "model.safetensors")
    assert mean.keys() == tensors.keys()
    for key, value in mean.items():
        assert torch.allclose(value, tensors[key] + 0.25, atol=1e-6), key


def test_a_mean_states_every_way_that_its_members_were_tuned(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The model that they started from was not tuned: it says nothing."""
    members = []
    for name, method in (("one", "full"), ("two", "qlora")):
        with artefact.writing(tmp_path / name, "student", {}, 0, {"model": tiny_model}) as draft:
            for file in tiny_model.iterdir():
                if file.is_file():
                    shutil.copyfile(file, draft.path / file.name)
            draft.extra = {"tuned": {"method": method, "distilled": name == "two", "scores": {}}}
        members.append(tmp_path / name)
    made = run_merge(MergeConfig(), tiny_model, tiny_model, None, tmp_path / "mean", others=members)
    assert made.extra["tuned"] == {"method": "full", "distilled": True, "logits": False}
    assert made.extra["tuned_before"] == [{"method": "qlora", "distilled": True}]
    said = techniques({**made.extra, "precision": "bf16"})
    assert "fine-tuning of all decoder weights" in said and len(said) == 3


def test_adapters_of_several_kinds_are_told_apart(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    one = on_record(
        adapter, tmp_path / "one", tiny_model, arithmetic="float32", langs=["de"],
        tuned={"method": "qlora", "distilled": False},
    )  # fmt: skip
    two = on_record(
        adapter, tmp_path / "two", tiny_model, arithmetic="bfloat16", langs=["de"],
        tuned={"method": "qlora", "distilled": True, "logits": True},
    )  # fmt: skip
    config = MergeConfig(onto="dequantized", dtype="float32")
    with pytest.raises(InputError, match="4-bit bases are not the same"):
        run_merge(config, tiny_model, one, None, tmp_path / "mixed", others=[two])
    plain = MergeConfig(onto="base", dtype="float32")
    made = run_merge(plain, tiny_model, one, None, tmp_path / "mean", others=[two])
    assert made.extra["tuned"] == {"method": "qlora", "distilled": True, "logits": True}


def test_onto_dequantised_is_nearer_to_what_qlora_trained(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    students = {}
    trained = on_record(adapter, tmp_path / "adapter", tiny_model, arithmetic="float32")
    for onto in ("base", "dequantized"):
        config = MergeConfig(onto=onto, dtype="float32")
        run_merge(config, tiny_model, trained, None, tmp_path / onto)
        students[onto] = logits(load_model(tmp_path / onto))
    on = logits(load_model(tiny_model, quantization="nf4", adapter=adapter))
    gaps = {onto: (on - found).abs().mean() for onto, found in students.items()}
    assert gaps["dequantized"] < 0.05
    assert gaps["dequantized"] < gaps["base"] / 5


@pytest.mark.parametrize("recorded", [None, "bfloat16", "float32"])
def test_onto_dequantised_rounds_in_the_arithmetic_of_the_training(
    tmp_path: Path, tiny_model: Path, adapter: Path, recorded: str | None
) -> None:
    facts = {"arithmetic": recorded} if recorded else {}
    trained = on_record(adapter, tmp_path / "adapter", tiny_model, **facts)
    config = MergeConfig(onto="dequantized", dtype="float32")
    run_merge(config, tiny_model, trained, None, tmp_path / "s")
    key = "language_model.model.layers.0.mlp.down_proj.weight"
    base = next(each for each in iter_stored(tiny_model) if each.key == key)
    merged = next(each for each in iter_stored(tmp_path / "s") if each.key == key).tensor()
    wanted = nf4.rounded(base, recorded or "bfloat16")
    read = read_adapter(trained, family_for(read_config(tiny_model)), tensor_shapes(tiny_model))
    (rows,) = read.added(key, [(0, wanted)])
    assert torch.equal(merged, rows)


def test_an_adapter_on_record_fits_its_own_model_alone(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    other = tiny.make_model(tmp_path / "other", seed=9)
    trained = on_record(adapter, tmp_path / "adapter", tiny_model)
    with pytest.raises(ArtefactError, match=r"was tuned on another model than .*other"):
        run_merge(MergeConfig(), other, trained, None, tmp_path / "s")
    assert not list(tmp_path.glob("*s*partial*")) and not (tmp_path / "s").exists()
    run_merge(MergeConfig(), tiny_model, trained, None, tmp_path / "s")
    # What peft made elsewhere has no record: its shapes must do.
    run_merge(MergeConfig(), other, adapter, None, tmp_path / "elsewhere")


def test_auto_scores_both_and_keeps_the_better(
    tmp_path: Path, tiny_model: Path, adapter: Path, tiny_corpus: Path
) -> None:
    config = MergeConfig(onto="auto", langs=("de",), select_segments=3, requantized=True)
    made = run_merge(config, tiny_model, adapter, tiny_corpus, tmp_path / "s")
    rows = made.extra["merge"]["rows"]
    assert [(row["form"], row["onto"], row["precision"]) for row in rows] == [
        ("adapter on", "dequantized", "nf4"),
        ("merged", "base", "bfloat16"),
        ("merged, quantised", "base", "nf4"),
        ("merged", "dequantized", "bfloat16"),
        ("merged, quantised", "dequantized", "nf4"),
    ]
    scores, quantised = (
        {row["onto"]: row["scores"]["de"]["score"] for row in rows if row["form"] == form}
        for form in ("merged", "merged, quantised")
    )
    better = "dequantized" if quantised["dequantized"] > quantised["base"] else "base"
    card = (made.path / "README.md").read_text()
    assert all(row["scores"]["de"]["signature"] in card for row in rows)
    head = read_head(made.path)
    assert head["model-index"][0]["results"][0]["metrics"][0]["value"] == round(scores[better], 2)
    assert made.extra["onto"] == better
    alone = MergeConfig(onto=better)
    run_merge(alone, tiny_model, adapter, None, tmp_path / "alone")
    names = [path / "model.safetensors" for path in (tmp_path / "s", tmp_path / "alone")]
    assert artefact.file_sha256(names[0]) == artefact.file_sha256(names[1])


def test_a_merge_that_was_stopped_keeps_its_scores(
    tmp_path: Path,
    tiny_model: Path,
    adapter: Path,
    tiny_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MergeConfig(onto="auto", langs=("de",), select_segments=2, requantized=True)
    calm = run_merge(config, tiny_model, adapter, tiny_corpus, tmp_path / "calm" / "s")
    loaded, whole = [], merge.load_model

    def load(path: Path, **options: Any) -> Any:
        loaded.append(Path(path).name)
        if len(loaded) == 4:
            raise KeyboardInterrupt
        return whole(path, **options)

    monkeypatch.setattr(merge, "load_model", load)
    with pytest.raises(KeyboardInterrupt):
        run_merge(config, tiny_model, adapter, tiny_corpus, tmp_path / "s")
    made = run_merge(config, tiny_model, adapter, tiny_corpus, tmp_path / "s")
    assert loaded == [
        tiny_model.name,
        "base",
        "base-nf4",
        "dequantized",
        "dequantized",
        "dequantized-nf4",
    ]
    assert artefact.identity(made.path) == artefact.identity(calm.path)


def test_student_loads_in_stock_transformers_from_shards(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    config = MergeConfig(max_shard_bytes=200_000, verify="structure")
    run_merge(config, tiny_model, adapter, None, tmp_path / "s")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 3
    _, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {kind for _, kind in tensor_shapes(tmp_path / "s").values()} == {"BF16"}
    assert json.loads((tmp_path / "s" / "config.json").read_text())["dtype"] == "bfloat16"
    assert artefact.verify(tmp_path / "s") == []
    head = read_head(tmp_path / "s")
    assert head["pipeline_tag"] and head["base_model"] == tiny_model.name
    card = (tmp_path / "s" / "README.md").read_text()
    assert f"Stored bytes: {stored_bytes(tmp_path / 's'):,}" in card
    assert "You are a professional translator." in card, "other software must ask as it was taught"
    assert "<|AUDIO|><|audio_eos|>\nTranslate the English speech into German:" in card


def test_a_fully_tuned_model_passes_through(tmp_path: Path, tiny_model: Path) -> None:
    tuned = tiny.make_model(tmp_path / "tuned", seed=5)
    run_merge(MergeConfig(dtype="float32"), tiny_model, tuned, None, tmp_path / "s")
    assert torch.equal(logits(load_model(tuned)), logits(load_model(tmp_path / "s")))


def test_refuses_another_model_s_adapter(tmp_path: Path, adapter: Path) -> None:
    other = tiny.make_model(tmp_path / "other", num_hidden_layers=4)
    with pytest.raises(ArtefactError, match="does not fit the model"):
        run_merge(MergeConfig(), other, adapter, None, tmp_path / "s")
    assert not list(tmp_path.glob("*s*partial*")) and not (tmp_path / "s").exists()


def test_refuses_dora_and_auto_without_a_corpus(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    with pytest.raises(InputError, match="corpus"):
        run_merge(MergeConfig(onto="auto"), tiny_model, adapter, None, tmp_path / "s")
    dora = tmp_path / "dora"
    dora.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    (dora / "adapter_model.safetensors").write_bytes(
        (adapter / "adapter_model.safetensors").read_bytes()
    )
    pissa = shutil.copytree(adapter, tmp_path / "pissa")
    (pissa / "adapter_config.json").write_text(
        json.dumps({**settings, "init_lora_weights": "pissa_niter_4"})
    )
    with pytest.raises(ArtefactError, match="init_lora_weights 'pissa_niter_4'"):
        run_merge(MergeConfig(), tiny_model, pissa, None, tmp_path / "s")
    with pytest.raises(ArtefactError, match="use_dora"):
        run_merge(MergeConfig(), tiny_model, dora, None, tmp_path / "s")


@pytest.mark.parametrize("config", [[], {"r": 0}, {"r": "x"}, {"lora_alpha": None}])
def test_refuses_adapter_settings_of_another_shape(
    config: Any, tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    damaged = shutil.copytree(adapter, tmp_path / "damaged")
    file = damaged / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config if config else config))
    with pytest.raises(ArtefactError, match=r"adapter_config\.json"):
        run_merge(MergeConfig(), tiny_model, damaged, None, tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e9, "float16", "holds 1e+09, which is infinite in float16"),
        (float("nan"), "bfloat16", "no numbers, or would after the merge"),
    ],
)
def test_refuses_a_student_that_is_not_finite(
    value: float, dtype: str, says: str, tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    model = spoilt(tiny_model, tmp_path / "model", value)
    with pytest.raises(ArtefactError) as error:
        run_merge(MergeConfig(dtype=dtype), model, adapter, None, tmp_path / "s")
    assert says in str(error.value) and "layers.3.mlp.up_proj.weight" in str(error.value)
    assert not (tmp_path / "s").exists()
