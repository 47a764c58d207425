"""Checkpoints leave in pieces, load in stock transformers, and say where they come from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from compress.config import PruneConfig
from compress.prune import run_prune
from export import nf4
from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from halve import artefact, hashing, shard_writer, shards
from halve.errors import ArtefactError
from halve.languages import language
from halve.models import load_model
from halve.origin import origin, read_head
from halve.translate import TorchTranslator
from tests import tiny
from tests.families.text_models import make_model as make_text_model

STOCK = """
import sys
sys.modules["halve"] = sys.modules["compress"] = sys.modules["export"] = None
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, GenerationConfig
for path in sys.argv[1:]:
    model, info = AutoModelForMultimodalLM.from_pretrained(
        path, local_files_only=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    processor = AutoProcessor.from_pretrained(path)
    ids = torch.tensor([processor.tokenizer("open the file")["input_ids"]])
    assert model(input_ids=ids).logits.isfinite().all()
    settings = GenerationConfig.from_pretrained(path)
    assert settings.do_sample is False and settings.num_beams == 1 and settings.top_k is None
print("loaded", len(sys.argv) - 1)
"""
STOCK_TOKENS = """
import sys
for name in ("halve", "compress", "export", "serve", "benchmarks", "pipeline"):
    sys.modules[name] = None
import json, pathlib
import numpy as np
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
path, folder, text = sys.argv[1:]
model = AutoModelForMultimodalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
processor = AutoProcessor.from_pretrained(path)
for clip in sorted(pathlib.Path(folder).glob("*.npy")):
    inputs = processor(text=text, audio=np.load(clip), sampling_rate=16000, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    print(json.dumps(output[0, inputs["input_ids"].shape[1]:].tolist()))
"""
CARD = "---\nlicense: apache-2.0\nbase_model: someone/speech-7b\nlanguage: [en, de]\n---\n\n# A teacher\n"


def save(path: Path, tensors: dict[str, torch.Tensor], limit: int = 10**9) -> list[Path]:
    kinds = {name: kind for kind, name in shards.TORCH_TYPES.items()}
    parts = [
        shard_writer.Part(
            key, kinds[str(value.dtype).removeprefix("torch.")], tuple(value.shape), value.nbytes,
            lambda value=value: [shard_writer.raw(value)],
        )
        for key, value in tensors.items()
    ]  # fmt: skip
    return list(shard_writer.write_shards(path, parts, limit))


def test_the_whole_chain_loads_without_halve_and_carries_its_origin(
    tmp_path: Path, tiny_model: Path, adapter: Path, tiny_corpus: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text(CARD)
    settings = json.loads((tmp_path / "teacher" / "generation_config.json").read_text())
    sampled = {**settings, "do_sample": True, "top_k": 20, "temperature": 0.7}
    (tmp_path / "teacher" / "generation_config.json").write_text(json.dumps(sampled))
    pruned = run_prune(PruneConfig(layers=(5,)), tmp_path / "teacher", None, tmp_path / "pruned")
    part = _without_layer_5(adapter, tmp_path / "adapter")
    config = MergeConfig(max_shard_bytes=200_000)
    student = run_merge(config, pruned.path, part, None, tmp_path / "student").path
    made = [pruned.path, student]
    for precision in ("bf16", "nf4"):
        settings = PackageConfig(
            target="checkpoint", precision=precision, langs=("de",), max_shard_bytes=200_000
        )
        made.append(run_package(settings, student, None, tmp_path / precision).path)
    command = [sys.executable, "-c", STOCK, *map(str, made)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "loaded 4", done.stderr
    for path in made[1:]:
        head = read_head(path)
        assert head["base_model"] == "someone/speech-7b" and head["license"] == "apache-2.0"
        card = (path / "README.md").read_text()
        assert "removed (as the teacher numbers them): [5]" in card
        assert "Stored bytes" in card and "Logical parameters" in card and "apache-2.0" in card
        assert artefact.verify(path) == []
        assert len(list(path.glob("*.safetensors"))) > 2 and (path / shards.INDEX).is_file()


def test_a_student_says_the_same_tokens_where_halve_cannot_be_imported(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    student = run_merge(MergeConfig(), tiny_model, adapter, None, tmp_path / "student").path
    clips = [tiny.tone(0.7 + index / 2, index) for index in range(4)]
    for index, clip in enumerate(clips):
        np.save(tmp_path / f"{index}.npy", clip)
    speech = load_model(student, dtype="float32")
    prompt = speech.family.prompt_text(speech.processor, speech.family.instruction(language("de")))
    command = [sys.executable, "-c", STOCK_TOKENS, str(student), str(tmp_path), prompt]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    ends = speech.family.end_ids(speech.model)
    stock = [[t for t in json.loads(line) if t not in ends] for line in done.stdout.splitlines()]
    ours = TorchTranslator(speech).translate(clips, "de", limits=[12] * len(clips))
    assert [row.tokens for row in ours] == stock
    assert len({tuple(tokens) for tokens in stock}) > 1, "the clips must not all sound alike"


def _without_layer_5(adapter: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copyfile(adapter / "adapter_config.json", target / "adapter_config.json")
    kept = {
        key: stored.tensor()
        for key, stored in shards.read_header(adapter / "adapter_model.safetensors").items()
        if ".layers.5." not in key
    }
    save(target, kept)[0].rename(target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nf4_codes_are_those_of_bitsandbytes(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(4100, 192) * 0.02).to(dtype)
    weight[3] = 0
    weight[4, :64] = -0.3
    save(tmp_path, {"a.weight": weight})
    stored = shards.read_header(tmp_path / shards.SINGLE)["a.weight"]
    found = {p.key: b"".join(map(bytes, p.pieces())) for p in nf4.parts_of(stored)}
    packed, state = quantize_4bit(
        weight.bfloat16(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert found["a.weight"] == packed.numpy().tobytes()
    for name, tensor in state.as_dict(packed=True).items():
        wanted = tensor.numpy().tobytes()
        assert found[f"a.weight.{name}"].rstrip(b" ") == wanted, name
    packed, state = quantize_4bit(
        weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(nf4.rounded(stored, "float32"), dequantize_4bit(packed, state))


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
def test_rounded_weights_are_those_that_training_computes_with(
    tiny_model: Path, arithmetic: str
) -> None:
    """The tiny model is stored in float32: cast to bfloat16, some of its weights get other codes."""
    trained = load_model(tiny_model, dtype=arithmetic, quantization="nf4")
    path, key = "model.language_model.layers.0.mlp.", "language_model.model.layers.0.mlp."
    stored = {each.key: each for each in shards.iter_stored(tiny_model)}
    for name in ("up_proj", "down_proj"):
        weight = trained.part(path + name).weight
        wanted = dequantize_4bit(weight.data, weight.quant_state).float()
        assert torch.equal(nf4.rounded(stored[f"{key}{name}.weight"], arithmetic), wanted)


def test_norms_of_every_head_are_not_quantised(tmp_path: Path) -> None:
    model = make_text_model(
        tmp_path / "m", "cohere", hidden_size=256, num_attention_heads=4, head_dim=64
    )
    config = PackageConfig(target="checkpoint", precision="nf4", langs=("de",))
    made = run_package(config, model, None, tmp_path / "p").path
    kinds = {key: kind for key, (_, kind) in shards.tensor_shapes(made).items()}
    layer = "model.layers.0.self_attn."
    assert kinds[f"{layer}q_norm.weight"] == kinds[f"{layer}k_norm.weight"] == "BF16"
    assert kinds[f"{layer}q_proj.weight"] == "U8"
    packaged = load_model(made, dtype="bfloat16").model.state_dict()
    loaded = load_model(model, dtype="bfloat16", quantization="nf4").model.state_dict()
    assert packaged.keys() == loaded.keys()
    assert all(torch.equal(packaged[key], loaded[key]) for key in loaded)


def test_shards_are_hashed_while_they_are_written(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(50, 40) for n in range(5)} | {"scalar": torch.tensor(3)}
    files = save(tmp_path, tensors, limit=17_000)
    assert len(files) == 3
    assert hashing.sha256_of(files) == [hashing.file_sha256(file) for file in files]
    found = {stored.key: stored.tensor() for stored in shards.iter_stored(tmp_path)}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    rows = [part for _, part in shards.read_header(files[0])["t0"].rows(1000)]
    assert len(rows) > 5 and torch.equal(torch.cat(rows), tensors["t0"])


def test_a_remembered_hash_does_not_outlive_a_change(tmp_path: Path) -> None:
    (file,) = save(tmp_path, {"a": torch.ones(10)})
    before = hashing.sha256_of([file])
    file.write_bytes(file.read_bytes()[:-1] + b"x" * 2)
    assert hashing.sha256_of([file]) == [hashing.file_sha256(file)] != before


@pytest.mark.parametrize("harm", ["cut", "header", "index"])
def test_damaged_weights_are_named(harm: str, tmp_path: Path) -> None:
    files = save(tmp_path, {f"t{n}": torch.randn(50, 40) for n in range(3)}, limit=9000)
    if harm == "cut":
        files[1].write_bytes(files[1].read_bytes()[:-4])
    elif harm == "header":
        files[1].write_bytes(files[1].read_bytes().replace(b'"shape"', b'"shap!"'))
    else:
        index = json.loads((tmp_path / shards.INDEX).read_text())
        index["weight_map"]["t9"] = files[1].name
        (tmp_path / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(ArtefactError, match=f"{files[1].name} is damaged"):
        shards.tensor_shapes(tmp_path)


def test_a_checkpoint_in_4_bits_is_not_packaged_again(
    tmp_path: Path, tiny_model: Path, adapter: Path
) -> None:
    config = PackageConfig(target="checkpoint", precision="nf4", langs=("de",))
    made = run_package(config, tiny_model, None, tmp_path / "nf4").path
    with pytest.raises(ArtefactError, match="stored quantised"):
        run_package(config, made, None, tmp_path / "again")


def test_origin_of_a_model_in_the_hub_s_cache(tmp_path: Path) -> None:
    place = tmp_path / "models--Qwen--Qwen2-Audio-7B" / "snapshots" / "abc"
    place.mkdir(parents=True)
    assert origin(place) == {"base_model": "Qwen/Qwen2-Audio-7B"}
    assert origin(tiny.make_model(tmp_path / "mine"))["base_model"] == "mine"
