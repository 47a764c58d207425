"""What only Voxtral has: Mistral's own tokenizer file, and the shapes of its two releases."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from transformers import AutoModelForMultimodalLM, VoxtralConfig

from compress.config import PruneConfig
from compress.prune import run_prune
from halve.audio import SAMPLE_RATE_HZ
from halve.families import FAMILIES, family_for
from halve.languages import language
from halve.models import load_model
from tests import tiny
from tests.families.voxtral_models import make_voxtral

FAMILY = FAMILIES["voxtral"]
INSTRUCTION = FAMILY.instruction(language("de"))
RELEASED: dict[str, dict[str, Any]] = {
    "Mini 3B": {},
    "Small 24B": {"hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40},
}
"""The decoder's settings that differ from what the class takes by itself."""
RUNNER = """
import json, sys
sys.modules["halve"] = sys.modules["compress"] = sys.modules["export"] = None
from transformers import AutoModelForMultimodalLM, AutoProcessor
path, clip, instruction = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path)
content = [{"type": "audio", "path": clip}, {"type": "text", "text": instruction}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True)
model = AutoModelForMultimodalLM.from_pretrained(path, dtype="auto")
said = model.generate(**inputs, max_new_tokens=32, do_sample=False)
print(json.dumps([inputs["input_ids"][0].tolist(), said[0].tolist()]))
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voxtral(tmp_path_factory.mktemp("voxtral") / "teacher")


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_the_released_shapes(name: str) -> None:
    facts = VoxtralConfig(text_config=RELEASED[name], audio_token_id=24).to_dict()
    short: dict[str, Any] = {"model_type": "voxtral", "text_config": RELEASED[name]}
    for layers in (None, 7):
        if layers is not None:
            facts = FAMILY.kept_config(facts, range(layers))
            short["text_config"] = {**RELEASED[name], "num_hidden_layers": layers}
        with torch.device("meta"):
            model = AutoModelForMultimodalLM.from_config(VoxtralConfig(**facts))
        count = sum(weight.numel() for weight in model.parameters())
        assert family_for(facts).count_parameters(facts).total == count
        # Released configs leave out what the class takes by itself.
        assert FAMILY.count_parameters({**short, "audio_config": {}}).total == count


def test_the_student_keeps_the_only_tokenizer_file(teacher: Path, tmp_path: Path) -> None:
    run_prune(PruneConfig(layers=(1, 3)), teacher, None, tmp_path / "pruned")
    kept = (tmp_path / "pruned" / "tekken.json").read_bytes()
    assert kept == (teacher / "tekken.json").read_bytes()
    speech = load_model(tmp_path / "pruned")
    before, after = FAMILY.prompt_ids(speech.processor, INSTRUCTION)
    assert before == [1, 3, 25]
    assert after[-1] == 4
    assert FAMILY.decode_text(speech.processor, after) == INSTRUCTION


def test_the_student_runs_where_halve_is_not(teacher: Path, tmp_path: Path) -> None:
    """The stock processor asks mistral-common for the prompt: it is halve's."""
    pytest.importorskip("mistral_common")
    student, clip = tmp_path / "student", tmp_path / "clip.wav"
    run_prune(PruneConfig(layers=(1, 3)), teacher, None, student)
    soundfile.write(clip, tiny.tone(1.2, 5), SAMPLE_RATE_HZ, subtype="FLOAT")
    command = [sys.executable, "-c", RUNNER, str(student), str(clip), INSTRUCTION]
    ran = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    asked, said = json.loads(ran.stdout.splitlines()[-1])
    speech = load_model(student)
    samples, _ = soundfile.read(clip, dtype="float32")
    inputs = FAMILY.stock_inputs(speech.processor, samples, INSTRUCTION, torch.float32)
    assert inputs["input_ids"].tolist() == [asked]
    tokens = FAMILY.stock_generate(speech.model, inputs, max_new_tokens=32)
    assert said == [*asked, *tokens]
