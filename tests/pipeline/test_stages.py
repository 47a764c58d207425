"""A whole run on a tiny model; what is current is not made again; plans of runs."""

import json
from pathlib import Path

import pytest

from halve import artefact
from halve.errors import InputError
from halve.progress import SILENT
from pipeline import stages
from pipeline.cli import main
from pipeline.recipe import Recipe, read_recipe
from pipeline.stages import Run


@pytest.fixture(scope="module")
def finished(small_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(read_recipe(small_recipe), tmp_path_factory.mktemp("runs") / "small")
    stages.run_all(run, None, None, SILENT)
    return run


def test_a_recipe_from_end_to_end(finished: Run) -> None:
    kinds = {
        "corpus": "corpus",
        "importance": "importance",
        "pruned": "pruned",
        "translations": "translations",
        "adapter": "adapter",
        "student": "student",
        "packages/checkpoint-bf16": "package",
        "results/quality": "results",
        "report": "report",
    }
    for folder, kind in kinds.items():
        assert artefact.read(finished.out / folder, kind).kind == kind
        assert artefact.verify(finished.out / folder) == []
    assert not [path for path in finished.out.rglob(".*") if path.is_dir()], "nothing half-written"
    plan = json.loads((finished.out / "importance" / "plan.json").read_text())
    assert len(plan["removed"]) == 2
    config = json.loads((finished.out / "student" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    assert (finished.out / "report" / "report.html").is_file()


def test_nothing_is_made_twice(finished: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    ran = stages.run_all(finished, None, None, SILENT)
    assert all(one.done for one in ran)
    after = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    assert before == after


def test_only_what_depends_on_a_change_is_planned_again(finished: Run) -> None:
    values = finished.recipe.model_dump()
    values["tune"]["epochs"] = 3
    changed = Run(Recipe.model_validate(values), finished.out)
    planned, _ = stages.plan(changed, None, None)
    state = {one.step.stage: one.done for one in planned}
    assert state["corpus"] and state["importance"] and state["prune"] and state["distill"]
    assert not (state["tune"] or state["merge"] or state["package"] or state["report"])


def test_windows(finished: Run, tmp_path: Path) -> None:
    names = [step.stage for step in stages.steps_between(finished, "prune", "merge")]
    assert names == ["prune", "distill", "tune", "merge"]
    with pytest.raises(InputError, match="Unknown stage"):
        stages.steps_between(finished, "cook", None)
    with pytest.raises(InputError, match="comes after"):
        stages.steps_between(finished, "merge", "prune")
    with pytest.raises(InputError, match="missing"):
        stages.steps_between(Run(finished.recipe, tmp_path / "new"), "prune", None)


def test_missing_inputs_stop_a_run_before_it_starts(small_recipe: Path, tmp_path: Path) -> None:
    values = read_recipe(small_recipe).model_dump()
    values["corpus"]["source"] = str(tmp_path / "nowhere")
    run = Run(Recipe.model_validate(values), tmp_path / "out")
    with pytest.raises(InputError, match="nowhere"):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()


def test_dry_run_counts_the_papers_parameters(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "qwen2_audio",
        "audio_config": {
            "d_model": 1280,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "num_mel_bins": 128,
            "max_source_positions": 1500,
        },
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 156032,
        },
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    recipe = tmp_path / "seven.yaml"
    recipe.write_text(
        f"lang: de\nteacher: model\ncorpus: {{source: {tiny_corpus}, format: halve}}\n"
        "importance: {remove: 8, dtype: bfloat16}\nprune: {}\ndistill: {dtype: bfloat16}\ntune: {}\n"
        "packages: [{target: checkpoint, precision: nf4}]\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe), "--dry-run", "--json", "--out", str(tmp_path / "out")])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["teacher_parameters"] == 8_397_094_912
    assert found["student_parameters"] == 6_777_929_728
    costs = {one["stage"]: one for one in found["stages"]}
    assert 12e9 < costs["merge"]["disk_bytes"] < 15e9
    assert 6e9 < costs["package checkpoint-nf4"]["disk_bytes"] < 7e9
    assert costs["importance"]["memory_bytes"] > 16.8e9
    assert all(one["time_s"] > 0 for one in found["stages"])
    assert not (tmp_path / "out").exists()
