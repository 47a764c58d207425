"""Contest packages: what the organisers run works in an environment that has nothing of ours."""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from export.config import PackageConfig
from export.contest import check_contest
from export.package import run_package
from export.runtime import open_translator
from halve import artefact
from halve.checks import doubtful_lines
from halve.errors import InputError
from halve.families import FAMILIES, SourceText
from tests.families.text_models import make_corpus as make_text_corpus
from tests.families.text_models import make_model as make_text_model

LINES = ["open the file", "", "close the window\rand the door", "a"]


@pytest.fixture(scope="module")
def wmt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wmt")
    plain = {"mlp_bias": False, "attention_bias": False}
    model = make_text_model(folder / "model", "llama", seed=3, **plain)
    config = PackageConfig(target="onnx", precision="fp32", langs=("de",), contest="wmt")
    run_package(config, model, make_text_corpus(folder / "corpus"), folder / "package")
    return folder / "package"


def test_wmt_package_runs_in_an_empty_environment(wmt: Path, tmp_path: Path) -> None:
    """As the organisers do: copied elsewhere, nothing of ours on the path, setup.sh, then run.sh."""
    place = tmp_path / "somewhere else"
    subprocess.run(["cp", "-r", wmt, place], check=True)
    (tmp_path / "input.txt").write_bytes(("\ufeff" + "\n".join(LINES) + "\n").encode())
    # What leads to a package index here, and the interpreter that the tests were asked to run on.
    ways = ("PIP_", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTP", "http", "NO_PROXY", "no_proxy")
    kept = {key: value for key, value in os.environ.items() if key.startswith(ways)}
    clean = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path), **kept}
    clean["PYTHON"] = sys.executable
    subprocess.run([place / "setup.sh"], check=True, env=clean, cwd=tmp_path, timeout=900)
    command = [place / "run.sh", "--lang-pair", "en-de", "--batch-size", "3"]
    command += ["--input", "input.txt", "--output", "output.txt"]
    subprocess.run(command, check=True, env=clean, cwd=tmp_path, timeout=120)
    said = (tmp_path / "output.txt").read_text(encoding="utf8").split("\n")
    assert len(said) == len(LINES) + 1
    assert said[1] == ""
    translator = open_translator(wmt)
    sources = [SourceText(line, "en") for line in LINES if line]
    own = [" ".join(each.text.split()) for each in translator.translate(sources, "de")]
    assert [said[0], said[2], said[3]] == own
    bad = subprocess.run(
        [place / "run.sh", "--lang-pair", "en-xx", "--input", "input.txt", "--output", "o.txt"],
        env=clean, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr


def test_what_the_organisers_need_is_looked_for_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PackageConfig(target="onnx", precision="fp32", langs=("de",), contest="wmt")
    version = importlib.metadata.version

    def without_tokenizers(name: str) -> str:
        if name.startswith("tokenizers"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without_tokenizers)
    with pytest.raises(InputError, match="tokenizers is not installed here"):
        check_contest(config, FAMILIES["text"])

    def on_a_gpu(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3" if name == "onnxruntime-gpu" else version(name)

    monkeypatch.setattr("importlib.metadata.version", on_a_gpu)
    check_contest(config, FAMILIES["text"])


def test_wmt_package_states_its_size(wmt: Path) -> None:
    stated = json.loads((wmt / "size.json").read_text())
    shipped = [p for p in wmt.rglob("*") if p.is_file()]
    records = ("artefact.json", "timings.jsonl", "size.json")
    assert stated["stored_bytes"] == sum(
        path.stat().st_size for path in shipped if path.name not in records
    )
    # The card counts the scripts too.
    card = (wmt / "README.md").read_text(encoding="utf8")
    listed = sum(p.stat().st_size for p in shipped if p.name not in (*records, "README.md"))
    assert f"Stored bytes: {listed:,} " in card
    assert stated["logical_parameters"] > 0
    assert artefact.verify(wmt) == []
    card = (wmt / "README.md").read_text(encoding="utf8")
    for said in (
        "./setup.sh",
        "--lang-pair en-de --batch-size",
        "size.json",
        "pipeline_tag: translation",
    ):
        assert said in card
    assert "speech" not in card.lower(), "it reads text"
    pins = (wmt / "requirements.txt").read_text().splitlines()
    assert all("==" in pin for pin in pins)
    assert not any(pin.startswith(("torch", "transformers")) for pin in pins)
    assert not any(
        "/work" in path.read_text(errors="ignore") for path in shipped if path.suffix == ".sh"
    )


def test_iwslt_package_states_the_state_dict(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = PackageConfig(target="checkpoint", precision="bf16", langs=("de",), contest="iwslt")
    run_package(config, tiny_model, tiny_corpus, tmp_path / "package")
    stated = json.loads((tmp_path / "package" / "size.json").read_text())
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "package", dtype="auto")
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    assert stated["state_dict_bytes"] == pytest.approx(len(stream.getvalue()), rel=0.1)
    assert stated["state_dict_bytes"] == sum(
        each.numel() * each.element_size() for each in model.state_dict().values()
    )
    assert stated["logical_parameters"] == sum(each.numel() for each in model.parameters())
    assert stated["techniques"] == []
    card = (tmp_path / "package" / "README.md").read_text(encoding="utf8")
    assert "IWSLT" in card and "size.json" in card


@pytest.mark.parametrize(
    ("contest", "target", "precision", "expected"),
    [
        ("wmt", "onnx", "int8", "reads text"),
        ("iwslt", "onnx", "int8", "target checkpoint"),
    ],
)
def test_what_organisers_could_not_run_is_refused(
    contest: str, target: str, precision: str, expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = PackageConfig.model_validate(
        {"target": target, "precision": precision, "langs": ["de"], "contest": contest}
    )
    with pytest.raises(InputError, match=expected):
        run_package(config, tiny_model, None, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_doubtful_lines_are_named() -> None:
    lines = ["ein kurzer Satz hier"] * 8 + ["", "ein Wort " * 30]
    found = doubtful_lines(lines, [20.0] * 10, wanted=11)
    assert found[0] == "10 lines, where 11 are wanted"
    assert found[1] == "1 empty lines: 9"
    assert found[2].endswith("10")
    assert doubtful_lines(lines[:8], [20.0] * 8, 8) == []
    assert doubtful_lines(["", "so"], [0, 3], 2) == []  # an empty source may stay empty
