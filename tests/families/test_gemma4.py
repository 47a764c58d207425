"""What only Gemma 4 has: layers that cannot go, tables of all layers, and the runner of IWSLT's contest."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from compress.config import PruneConfig, TuneConfig
from compress.prune import run_prune
from compress.tune import run_tune
from export.config import MergeConfig
from export.merge import run_merge
from halve import artefact
from halve.audio import SAMPLE_RATE_HZ
from halve.errors import FamilyError
from halve.families import FAMILIES
from halve.models import load_model, read_config
from halve.translate import TorchTranslator
from tests import tiny
from tests.families.gemma_models import make_gemma4, make_gemma4_unified

FAMILY = FAMILIES["gemma4"]
PRUNED = (1, 3, 6)
FAMILIES_AND_PRUNED: dict[str, tuple[Callable[..., Path], tuple[int, ...]]] = {
    "gemma4": (make_gemma4, PRUNED),
    "gemma4_unified": (make_gemma4_unified, (1, 3)),
}
INSTRUCTION = "Translate the English speech into German:"
TORCHVISION = {
    "__init__.py": "__version__ = '0'\n",
    "io.py": "",
    "transforms/__init__.py": (
        "import enum\n"
        "names = 'NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS'\n"
        "InterpolationMode = enum.Enum('InterpolationMode', names)\n"
    ),
    "transforms/functional.py": "pil_to_tensor = None\n",
    "transforms/v2/__init__.py": "",
    "transforms/v2/functional.py": "from torchvision.transforms import InterpolationMode\n",
}
"""What the stock processor's image and video parts import and, asked about audio alone, never call."""
RUNNER = """
import json, sys
sys.modules["halve"] = sys.modules["compress"] = sys.modules["export"] = None
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, BitsAndBytesConfig
path, clip, instruction = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path)
content = [{"type": "audio", "audio": clip}, {"type": "text", "text": instruction}]
chat = [
    {"role": "system", "content": [{"type": "text", "text": "You are a professional translator."}]},
    {"role": "user", "content": content},
]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    enable_thinking=False, sampling_rate=16000)
four = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16)
settings = {
    "auto": {"dtype": "auto"},
    "nf4": {"quantization_config": four},
    "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
}
found = {}
for name, options in settings.items():
    model = AutoModelForMultimodalLM.from_pretrained(path, local_files_only=True, **options)
    given = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in inputs.items()
    }
    said = model.generate(**given, max_new_tokens=256, do_sample=False)
    found[name] = said[0, inputs["input_ids"].shape[1]:].tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma4(tmp_path_factory.mktemp("gemma4") / "teacher")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ((8,), "layer 8 cannot go: the last layer must be one of full attention"),
        ((1, 4), "layer 4 cannot go: layers 6, 7 read its keys and values"),
        ((5,), "layer 5 cannot go: layers 8 read its keys and values"),
    ],
)
def test_layers_that_others_need_are_refused(
    layers: tuple[int, ...], reason: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(FamilyError, match=reason):
        run_prune(PruneConfig(layers=layers), teacher, None, tmp_path / "pruned")
    assert not (tmp_path / "pruned" / artefact.RECORD).exists()


def test_the_config_follows_the_layers(teacher: Path, tmp_path: Path) -> None:
    run_prune(PruneConfig(layers=PRUNED), teacher, None, tmp_path / "pruned")
    text = read_config(tmp_path / "pruned")["text_config"]
    assert text["layer_types"] == [
        read_config(teacher)["text_config"]["layer_types"][layer] for layer in (0, 2, 4, 5, 7, 8)
    ]
    assert text["num_kv_shared_layers"] == 2
    assert {int(n): facts["head_dim"] for n, facts in text["per_layer_config"].items()} == {
        1: 32,
        3: 32,
        5: 32,
    }
    before, after = (
        load_file(path / "model.safetensors") for path in (teacher, tmp_path / "pruned")
    )
    table = "model.language_model.embed_tokens_per_layer.weight"
    assert torch.equal(after[table][:, 64:128], before[table][:, 128:192])
    projection = "model.language_model.per_layer_model_projection.weight"
    assert torch.equal(after[projection][-64:], before[projection][-64:])
    assert not any(key.startswith("lm_head") for key in after), "the head stays tied"


def test_a_config_as_released_and_tensors_that_nobody_reads(teacher: Path, tmp_path: Path) -> None:
    """The hub's configs name one head size for all full layers, its files keep keys of sharing layers."""
    released = tmp_path / "released"
    released.mkdir()
    for entry in teacher.iterdir():
        (released / entry.name).write_bytes(entry.read_bytes())
    config = read_config(teacher)
    del config["text_config"]["per_layer_config"]
    config["text_config"]["global_head_dim"] = 32
    (released / "config.json").write_text(json.dumps(config), encoding="utf8")
    tensors = load_file(teacher / "model.safetensors")
    for layer in (6, 7, 8):
        prefix = f"model.language_model.layers.{layer}.self_attn."
        tensors[f"{prefix}k_norm.weight"] = torch.ones(16)
        tensors[f"{prefix}v_proj.weight"] = torch.ones(32, 64)
    save_file(tensors, released / "model.safetensors", metadata={"format": "pt"})
    assert FAMILY.count_parameters(config) == FAMILY.count_parameters(read_config(teacher))
    made = run_prune(PruneConfig(layers=PRUNED, verify="full"), released, None, tmp_path / "pruned")
    run_prune(PruneConfig(layers=PRUNED), teacher, None, tmp_path / "plain")
    found, wanted = (
        load_file(path / "model.safetensors") for path in (made.path, tmp_path / "plain")
    )
    assert found.keys() == wanted.keys()
    assert "per_layer_config" not in read_config(made.path)["text_config"]


@pytest.mark.parametrize("name", FAMILIES_AND_PRUNED)
def test_what_models_say_that_stock_code_reads_otherwise(name: str, tmp_path: Path) -> None:
    """A placeholder that a model says is read as padding; what its settings suppress is never said."""
    make, _ = FAMILIES_AND_PRUNED[name]
    speech = load_model(make(tmp_path / name))
    config = speech.model.config
    marks = [config.image_token_id, config.video_token_id, config.audio_token_id]
    settings = speech.model.generation_config
    few = {*marks, *range(100, 103)}
    settings.begin_suppress_tokens = None
    settings.suppress_tokens = [n for n in range(config.text_config.vocab_size) if n not in few]
    clip, family = tiny.tone(1.2, 5), speech.family
    inputs = family.stock_inputs(speech.processor, clip, INSTRUCTION, torch.float32)
    wanted = family.stock_generate(speech.model, inputs, max_new_tokens=32)
    assert set(marks) & set(wanted), "the test shows something"
    assert set(wanted) <= few
    translator = TorchTranslator(speech)
    assert translator.translate([clip], "de", limits=[32])[0].tokens == wanted
    beams = family.stock_generate(speech.model, inputs, max_new_tokens=12, num_beams=3)
    others = [tiny.tone(0.8, 6), tiny.tone(1.9, 7)]
    found = translator.translate(
        [others[0], clip, others[1]], "de", limits=[5, 12, 8], beams=3, batch_size=9
    )
    assert found[1].tokens == beams
    for other, limit, row in zip(others, (5, 8), (found[0], found[2]), strict=True):
        assert row == translator.translate([other], "de", limits=[limit], beams=3)[0]


def make_student(name: str, corpus: Path, folder: Path) -> Path:
    """A student at the end of the road: pruned, tuned with QLoRA, merged."""
    make, layers = FAMILIES_AND_PRUNED[name]
    pruned, adapter, student = (folder / part for part in ("pruned", "adapter", "student"))
    run_prune(PruneConfig(layers=layers), make(folder / "teacher"), None, pruned)
    config = TuneConfig(
        langs=("de",), epochs=1, rank=4, alpha=8, learning_rate=1e-2, precision="float32",
        train_segments=4, select_segments=0,
    )  # fmt: skip
    run_tune(config, pruned, corpus, None, adapter)
    run_merge(MergeConfig(onto="base", dtype="float32"), pruned, adapter, None, student)
    return student


@pytest.mark.parametrize("name", FAMILIES_AND_PRUNED)
def test_the_student_runs_where_halve_is_not(name: str, tiny_corpus: Path, tmp_path: Path) -> None:
    """As the contest runs it: nothing but stock transformers, plain and quantised as it loads."""
    student = make_student(name, tiny_corpus, tmp_path)
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, tiny.tone(1.2, 5), SAMPLE_RATE_HZ, subtype="FLOAT")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if importlib.util.find_spec("torchvision") is None:
        for module, text in TORCHVISION.items():
            file = tmp_path / "site" / "torchvision" / module
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf8")
        environment["PYTHONPATH"] = str(tmp_path / "site")
    command = [sys.executable, "-c", RUNNER, str(student), str(clip), INSTRUCTION]
    ran = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    speech = load_model(student)
    samples, _ = soundfile.read(clip, dtype="float32")
    family = speech.family
    inputs = family.stock_inputs(speech.processor, samples, INSTRUCTION, torch.float32)
    assert said["auto"] == family.stock_generate(speech.model, inputs, max_new_tokens=256)
    assert said["nf4"] and said["int8"]
