"""A whole run on speech that nobody has translated, tuned in full: what no stage may stumble over, and what the cards say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report import run_report
from compress.config import TeachConfig
from compress.teach import run_teach
from halve import artefact
from halve.corpus import read_corpus, write_manifest
from halve.origin import read_head
from halve.progress import SILENT
from pipeline import stages
from pipeline.clean import find
from pipeline.recipe import Recipe, read_recipe
from pipeline.shell import language_of
from pipeline.stages import Run
from serve.models import _languages


@pytest.fixture(scope="module")
def finished(
    small_recipe: Path,
    tiny_corpus: Path,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("untranslated")
    source = shutil.copytree(tiny_corpus, folder / "source")
    write_manifest(
        source,
        [
            replace(each, references={}, source_text="") if each.split == "train" else each
            for each in read_corpus(tiny_corpus).segments
        ],
    )
    lesson = TeachConfig(
        langs=("de",), train_segments=4, epochs=30, batch_size=12, learning_rate=3e-3, projector_factor=2.0,
        select_segments=0, precision="float32",
    )  # fmt: skip
    run_teach(lesson, tiny_model, tiny_corpus, folder / "taught")
    # As it would come from elsewhere: without halve's records.
    teacher = folder / "teacher"
    shutil.copytree(
        folder / "taught", teacher, ignore=shutil.ignore_patterns("*.json?", "artefact*")
    )
    (teacher / "README.md").write_text("---\nlicense: mpl-2.0\n---\n")
    values = read_recipe(small_recipe).model_dump(exclude_unset=True)
    values["teacher"] = str(teacher)
    values["corpus"] |= {"source": str(source), "untranslated": "keep"}
    values["distill"] |= {"untranslated": True, "logits": 2}
    values["tune"] = {
        "langs": ("de",), "method": "full", "max_steps": 3, "batch_size": 4, "select_segments": 2,
        "logit_weight": 0.5,
    }  # fmt: skip
    one = {"parity_segments": 2, "max_drop": 100, "force": True, "langs": ("de",)}
    values["packages"] = [
        {"target": "onnx", "precision": "int4", "calibration_segments": 3, **one},
        {"target": "checkpoint", "precision": "bf16", "contest": "iwslt", **one},
    ]
    run = Run(Recipe.model_validate(values), folder / "run")
    stages.run_all(run, None, None, SILENT)
    return run


def test_it_comes_to_its_end(finished: Run) -> None:
    made = artefact.read(finished.out / "adapter", "student")
    assert made.extra["rows"].keys() == {"teacher"}
    package = json.loads((finished.packages[0] / "package.json").read_text())
    assert package["onnx"]["quantise"] == "gptq"
    report = (finished.out / "report" / "report.md").read_text()
    assert "Tuning: adapter" in report and "Scores on select" in report


def test_what_may_be_cleaned_is_in_the_report(finished: Run) -> None:
    (adapter,) = [one for one in find(finished.out) if one.path == finished.out / "adapter"]
    assert "the report has its history" in adapter.why
    record = json.loads((finished.out / "report" / "report.json").read_text())
    assert record["adapters"]["adapter"][0]["step"] == 0


def test_a_run_goes_on_after_it_was_cleaned(finished: Run, tmp_path: Path) -> None:
    cleaned = Run(finished.recipe, tmp_path / "cleaned")
    shutil.copytree(finished.out, cleaned.out)
    gone = {one.path.name for one in find(cleaned.out)}
    assert gone == {"pruned", "translations", "adapter", "states"}
    for one in find(cleaned.out):
        shutil.rmtree(one.path)
    names = [step.name for step in stages.steps_between(cleaned, "package", None)]
    assert names[-1] == "report"
    stages.run_all(cleaned, "report", None, SILENT)
    record = json.loads((cleaned.out / "report" / "report.json").read_text())
    assert record["adapters"] == {} and record["quality"]


def test_cards_say_whence_and_how(finished: Run) -> None:
    folders = [finished.out / name for name in ("pruned", "adapter", "student")]
    for folder in [*folders, *finished.packages]:
        head = read_head(folder)
        assert (head["base_model"], head["license"]) == ("teacher", "mpl-2.0"), folder
        card = (folder / "README.md").read_text()
        assert "Decoder layers removed" in card and "- Decoder layers: 4" in card, folder
    assert "Scores" not in (finished.out / "pruned" / "README.md").read_text()
    assert (
        "repetition loops cut short: chrf++ (de)"
        in (finished.out / "student" / "README.md").read_text()
    )
    stated = json.loads((finished.packages[1] / "size.json").read_text())
    assert [line.split(" (")[0] for line in stated["techniques"]] == [
        "iterative decoder layer pruning",
        "sequence-level knowledge distillation",
        "word-level knowledge distillation",
        "fine-tuning of all decoder weights",
    ]


def test_a_student_knows_its_language(finished: Run) -> None:
    student = finished.out / "student"
    assert language_of(student) == "de"
    assert _languages(student) == ("de",)


def test_two_runs_say_in_what_they_differ(finished: Run, tmp_path: Path) -> None:
    other = shutil.copytree(finished.out, tmp_path / finished.out.name)
    record = json.loads((other / "adapter" / "artefact.json").read_text())
    record["recipe"]["learning_rate"] = 0.5
    (other / "adapter" / "artefact.json").write_text(json.dumps(record))
    record = json.loads((other / "translations" / "artefact.json").read_text())
    record["recipe"]["batch_size"] = 2
    (other / "translations" / "artefact.json").write_text(json.dumps(record))
    run_report([finished.out, other], tmp_path / "report")
    found = json.loads((tmp_path / "report" / "report.json").read_text())["comparisons"]
    rate = artefact.read(finished.out / "adapter").recipe["learning_rate"]
    assert found[0]["changed"] == {
        "adapter learning_rate": [rate, 0.5],
        "translations batch_size": [4, 2],
    }
    assert f"adapter learning_rate: {rate} → 0.5" in (tmp_path / "report" / "report.md").read_text()
