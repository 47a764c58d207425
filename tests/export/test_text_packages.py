"""Packages of models that read: whole vocabularies, every source language, and a kill on the way."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from export.config import PackageConfig
from export.contest import run as contest_run
from export.manifest import read_manifest
from export.package import run_package
from export.runtime import open_translator
from halve import artefact
from halve.corpus import read_corpus, write_manifest
from halve.errors import InputError
from halve.families import SourceText
from halve.models import load_model, read_config
from halve.sources import asked
from halve.translate import TorchTranslator
from pipeline.budget import choices
from tests import tiny
from tests.families.text_models import make_corpus, make_model

PLAIN = {"mlp_bias": False, "attention_bias": False}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("readers") / "llama", "llama", seed=3, **PLAIN)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second segment is said to be Czech."""
    path = make_corpus(tmp_path_factory.mktemp("corpora") / "mixed")
    segments = read_corpus(path).segments
    (path / artefact.RECORD).unlink()
    mixed = [
        replace(each, source_lang="cs" if index % 2 else "en")
        for index, each in enumerate(segments)
    ]
    write_manifest(path, mixed)
    return path


@pytest.fixture(scope="module")
def package(reader: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = PackageConfig(target="onnx", precision="fp32", langs=("de",))
    return run_package(config, reader, corpus, tmp_path_factory.mktemp("packages") / "p").path


def test_a_tokenizer_saved_with_truncation_cuts_no_prompt(package: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(package, tmp_path / "cut")
    tokenizer = Tokenizer.from_file(str(cut / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    (cut / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf8")
    source = SourceText("Open the file and print the page.", "en")
    expected, found = (open_translator(each).translate([source], "de") for each in (package, cut))
    assert found == expected


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_a_reader_s_vocabulary_is_not_trimmed(
    target: str, reader: Path, corpus: Path, tmp_path: Path
) -> None:
    config = PackageConfig(target=target, precision="int8", langs=("de",), trim_vocab=True)
    with pytest.raises(InputError, match=r"reads with the same tokens.*--trim-vocab"):
        run_package(config, reader, corpus, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_trims_no_reader_s_vocabulary(reader: Path, tiny_model: Path) -> None:
    for model, trims in ((reader, False), (tiny_model, True)):
        found = choices(read_config(model), 1e9, kept_tokens=100)
        assert any("trimmed" in each.package for each in found) == trims
        assert any(each.package.startswith("onnx") for each in found)


def test_a_package_asks_as_its_student_does_whatever_the_source_s_language(
    reader: Path, package: Path
) -> None:
    assert read_manifest(package).parity["passed"]
    whole = TorchTranslator(load_model(reader))
    family, processor = whole.speech.family, whole.speech.processor
    translator = open_translator(package)
    texts = [SourceText("open the file.", code) for code in ("en", "cs", "ja", "xx")]
    prompts = [translator._prompt_with(each, "de") for each in texts]
    for text, ids in zip(texts, prompts, strict=True):
        assert ids == family.source_ids(processor, asked(family, "de", text), text)
    assert len({tuple(ids) for ids in prompts}) == 3, (
        "an unknown language is asked about as English"
    )
    expected = whole.translate(texts, "de", limits=[12] * 4)
    assert translator.translate(texts, "de", limits=[12] * 4) == expected


def test_a_package_of_an_earlier_halve_asks_as_it_did(package: Path, tmp_path: Path) -> None:
    facts = json.loads((package / "package.json").read_text())
    new = ("templates", "suppressed_ids", "suppressed_first_ids")
    templates = {key: facts.pop(key) for key in new}["templates"]
    facts["template"] = {"de": templates["de"]["cs"]}
    (tmp_path / "package.json").write_text(json.dumps(facts))
    manifest = read_manifest(tmp_path)
    assert manifest.reads == "text" and manifest.suppressed_ids == []
    for source in ("en", "cs", "zh"):
        assert manifest.templates["de"][source] == tuple(templates["de"]["cs"])


def test_contest_lines_are_asked_about_in_their_language(
    reader: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest_run, "HERE", package)
    lines = tmp_path / "lines.txt"
    lines.write_text("open the file.\nclose the old menu\n", encoding="utf8")
    whole, said = TorchTranslator(load_model(reader)), {}
    for code in ("en", "cs"):
        contest_run.translate(f"{code}_XX-de_DE", 2, lines, tmp_path / code)
        said[code] = (tmp_path / code).read_text(encoding="utf8").splitlines()
        texts = [SourceText(line, code) for line in lines.read_text().splitlines()]
        own = [" ".join(row.text.split()) for row in whole.translate(texts, "de")]
        assert said[code] == own
    assert said["en"] != said["cs"], "the language must make a difference here"
    with pytest.raises(InputError, match="Unknown language 'xx'"):
        contest_run.translate("xx-de", 2, lines, tmp_path / "out")


@pytest.mark.parametrize("target", ["checkpoint", "onnx"])
@pytest.mark.parametrize("hears", [False, True])
def test_a_model_without_a_generation_config_is_packaged(
    target: str, hears: bool, tmp_path: Path
) -> None:
    model = tmp_path / "m"
    model = tiny.make_model(model) if hears else make_model(model, "llama", **PLAIN)
    (model / "generation_config.json").unlink()
    ends = load_model(model).model.generation_config.eos_token_id
    config = PackageConfig(target=target, precision="fp32", langs=("de",))
    made = run_package(config, model, None, tmp_path / "p").path
    assert read_manifest(made).end_ids == [ends]


KILLED = """
import os, signal, sys
from pathlib import Path
from export.config import PackageConfig
from export.package import run_package
from halve import artefact
artefact._records = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
config = PackageConfig.model_validate_json(sys.argv[1])
run_package(config, Path(sys.argv[2]), None, Path(sys.argv[3]))
"""


def test_a_package_killed_at_its_end_is_made_as_if_it_never_was(
    reader: Path, tmp_path: Path
) -> None:
    config = PackageConfig(
        target="checkpoint", precision="bf16", langs=("de",), contest="wmt", max_shard_bytes=200_000
    )
    calm = run_package(config, reader, None, tmp_path / "calm" / "p").path
    struck = tmp_path / "struck" / "p"
    command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(reader), str(struck)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    left = struck.with_name(".p.partial")
    assert (left / "README.md").is_file() and (left / "code" / "halve").is_dir()
    run_package(config, reader, None, struck)
    assert artefact.identity(struck) == artefact.identity(calm)
    assert artefact.verify(struck) == []
    names = json.loads((struck / "package.json").read_text())["files"]
    assert "README.md" not in names and not left.exists()
    assert AutoTokenizer.from_pretrained(struck)
