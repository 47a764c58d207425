"""A whole run on a tiny model; what is current is not made again; plans of runs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.config import LatencyConfig, QualityConfig
from halve import artefact, environment
from halve.corpus import read_corpus, write_manifest
from halve.errors import ArtefactError, CorpusError, InputError
from halve.families import family_for
from halve.models import read_config
from halve.progress import SILENT
from pipeline import stages, steps
from pipeline.clean import find
from pipeline.cli import main
from pipeline.costs import Estimator
from pipeline.recipe import Recipe, read_recipe
from pipeline.stages import Run
from tests.families.gemma_models import make_gemma4
from tests.pipeline.conftest import ROOT


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


@pytest.mark.parametrize("stage", ["distill", "bench"])
def test_settings_that_records_leave_out_count_where_they_are_set(
    stage: str, finished: Run
) -> None:
    """Greedy results have no `beams` on record, as those made before there were any."""
    values = finished.recipe.model_dump()
    section = values["bench"]["quality"] if stage == "bench" else values["distill"]
    section["beams"] = 2
    planned, _ = stages.plan(Run(Recipe.model_validate(values), finished.out), None, None)
    state = {one.step.stage: one.done for one in planned}
    assert state["prune"] and not state[stage]


def test_how_often_a_run_is_saved_decides_nothing(finished: Run) -> None:
    values = finished.recipe.model_dump()
    values["tune"]["checkpoint_every"] = 7
    values["importance"]["workers"] = 2
    planned, _ = stages.plan(Run(Recipe.model_validate(values), finished.out), None, None)
    assert all(one.done for one in planned)


def test_another_spelling_of_the_source_is_the_same_corpus(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(finished.recipe.corpus.source)
    values = finished.recipe.model_dump()
    monkeypatch.chdir(source.parent)
    values["corpus"]["source"] = source.name
    respelt = Run(Recipe.model_validate(values), finished.out)
    planned, _ = stages.plan(respelt, None, None)
    assert all(one.done for one in planned)


def test_encoded_audio_is_kept_for_another_training_and_can_go(finished: Run) -> None:
    stored = finished.out / "states"
    assert [*stored.glob("states-*/states.bin")]
    why = {one.path: one.why for one in find(finished.out)}
    assert "would not encode it again" in why[stored]


def test_what_no_chosen_stage_reads_may_be_gone(finished: Run, tmp_path: Path) -> None:
    values = finished.recipe.model_dump()
    values["corpus"]["source"] = str(tmp_path / "gone")
    values["teacher"] = str(tmp_path / "gone")
    without = Run(Recipe.model_validate(values), finished.out)
    ran = stages.run_all(without, "merge", "package", SILENT)
    assert [one.step.stage for one in ran if one.done] == ["merge", "package"]
    with pytest.raises(ArtefactError, match="gone"):
        stages.run_all(without, "bench", None, SILENT)
    with pytest.raises(InputError, match="gone"):
        stages.run_all(without, None, "corpus", SILENT)


def test_a_plan_fetches_nothing(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "resolve_model", lambda model: pytest.fail(f"fetches {model}"))
    monkeypatch.setattr(steps, "local_model", lambda model: None)
    values = finished.recipe.model_dump()
    values["teacher"] = "somebody/on-the-hub"
    planned, _ = stages.plan(Run(Recipe.model_validate(values), finished.out), None, None)
    state = {one.step.stage: one.done for one in planned}
    assert state["corpus"] and not state["importance"]


def test_teacher_and_student_do_not_change_places(finished: Run) -> None:
    config = finished.recipe.bench.quality
    assert config is not None and isinstance(finished.teacher, Path)
    made = finished.out / "results" / "quality"
    packages = [finished.student, *finished.packages]
    step = steps.quality(config, finished.teacher, packages, finished.corpus, made)
    assert steps.up_to_date(step)
    others = [finished.teacher, *finished.packages]
    step = steps.quality(config, finished.student, others, finished.corpus, made)
    assert not steps.up_to_date(step)


def test_disk_counts_what_a_killed_run_goes_on_from(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most that lies in the run's directory while it tunes, against the estimate."""
    values = read_recipe(small_recipe).model_dump()
    values["tune"] |= {"method": "full", "rank": 64, "alpha": 128}
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    stages.run_all(run, None, "distill", SILENT)
    before, most = used(run.out), 0
    rename = Path.rename

    def looked(self: Path, target: Path) -> Path:
        nonlocal most
        most = max(most, used(run.out) - before)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", looked)
    (one,) = stages.run_all(run, "tune", "tune", SILENT)
    assert most and 0.9 < (one.cost.disk_bytes or 0) / most < 3


def used(folder: Path) -> int:
    """Bytes of all files under it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_merge_that_is_chosen_holds_both(small_recipe: Path, tmp_path: Path) -> None:
    disk = []
    for onto, requantized in (("base", False), ("auto", False), ("auto", True)):
        values = read_recipe(small_recipe).model_dump()
        values["merge"] |= {"onto": onto, "requantized": requantized}
        planned, _ = stages.plan(Run(Recipe.model_validate(values), tmp_path / "run"), None, None)
        (cost,) = [one.cost for one in planned if one.step.stage == "merge"]
        disk.append(cost.disk_bytes or 0)
    assert disk[1] == 2 * disk[0] < disk[2] < 3 * disk[0]


def test_what_is_only_quantised_is_measured_once(
    small_recipe: Path, tmp_path: Path, finished: Run
) -> None:
    """No student but the package: the teacher does not stand beside itself."""
    values = read_recipe(small_recipe).model_dump()
    for name in ("importance", "prune", "distill", "tune", "merge"):
        values[name] = None
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    (step,) = [step for step in stages.bench(run) if step.out.name == "quality"]
    assert step.inputs == (run.teacher, *run.packages, run.corpus)
    twice = steps.latency(
        LatencyConfig(lang="de"), [run.teacher, run.teacher, Path("p")], run.corpus, tmp_path / "l"
    )
    assert twice.roles == {"model 0": run.teacher, "model 1": Path("p")}


def test_where_a_scorer_lies_decides_nothing() -> None:
    one, other = (QualityConfig(lang="de", comet_checkpoint=f"/{name}/c") for name in "ab")
    assert one.recorded() == other.recorded() and not one.differs_from(other.recorded())


def test_a_report_of_runs_is_current(finished: Run, tmp_path: Path) -> None:
    step = steps.report([finished.out], tmp_path / "report")
    assert steps.carry_out(step, SILENT)[1]
    again = steps.report([finished.out], tmp_path / "report")
    assert steps.up_to_date(again)
    assert steps.carry_out(steps.report([tmp_path / "report"], tmp_path / "of"), SILENT)[1]
    assert steps.up_to_date(steps.report([tmp_path / "report"], tmp_path / "of"))
    parts = [finished.out / "pruned", finished.out / "adapter"]
    assert steps.carry_out(steps.report(parts, tmp_path / "two"), SILENT)[1]
    assert steps.up_to_date(steps.report(parts, tmp_path / "two"))
    assert not steps.up_to_date(steps.report(parts[::-1], tmp_path / "two")), "another direction"


def test_a_wide_beam_takes_its_time(small_recipe: Path, tmp_path: Path) -> None:
    costs = []
    for hypotheses in (1, 8):
        values = read_recipe(small_recipe).model_dump()
        values["distill"]["hypotheses"] = hypotheses
        planned, _ = stages.plan(Run(Recipe.model_validate(values), tmp_path / "run"), None, None)
        costs.append(next(one.cost for one in planned if one.step.stage == "distill"))
    assert (costs[1].disk_bytes or 0) > 4 * (costs[0].disk_bytes or 0)
    assert (costs[1].time_s or 0) > (costs[0].time_s or 0)


def test_a_bench_with_beams_takes_longer_and_no_more_disk(
    small_recipe: Path, tmp_path: Path
) -> None:
    costs = []
    for beams in (1, 8):
        values = read_recipe(small_recipe).model_dump()
        values["bench"]["quality"]["beams"] = beams
        planned, _ = stages.plan(Run(Recipe.model_validate(values), tmp_path / "run"), None, None)
        costs.append(next(one.cost for one in planned if one.step.stage == "bench"))
    assert costs[0].disk_bytes == costs[1].disk_bytes
    assert (costs[1].time_s or 0) > (costs[0].time_s or 0)


@pytest.mark.parametrize(("memory_mib", "merge_gb"), [(81559, 28.6), (24576, 15.1)])
def test_a_plan_asks_for_the_gpu_s_memory(
    memory_mib: int, merge_gb: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho {memory_mib}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    recipe = read_recipe(ROOT / "recipes" / "qwen2-audio-7b-de.yaml")
    planned, _ = stages.plan(Run(recipe, tmp_path / "run"), None, "bench")
    costs = {one.step.name: one.cost for one in planned}
    # Where float32 has no room, it is computed in bfloat16.
    assert (costs["merge"].memory_bytes or 0) / 1e9 == pytest.approx(merge_gb, abs=0.1)
    most = 0.4 * memory_mib * 2**20
    assert (costs["importance"].memory_bytes or 0) <= 0.5e9 + 2 * 8_397_094_912 + most


def test_packages_of_the_processor_take_its_time(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Estimator, "on_gpu", True)
    monkeypatch.setattr(Estimator, "cpu_flops", 1e9)
    values, times = read_recipe(small_recipe).model_dump(), {}
    for package in (("checkpoint", "bf16"), ("onnx", "int4"), ("onnx", "fp16")):
        values["packages"] = [dict(zip(("target", "precision"), package, strict=True))]
        planned, _ = stages.plan(Run(Recipe.model_validate(values), tmp_path / "run"), None, None)
        times[package] = next(one.cost.time_s or 0 for one in planned if one.step.stage == "bench")
    assert times["onnx", "int4"] > times["checkpoint", "bf16"] == times["onnx", "fp16"]


def test_windows(finished: Run, tmp_path: Path) -> None:
    names = [step.stage for step in stages.steps_between(finished, "prune", "merge")]
    assert names == ["prune", "distill", "tune", "merge"]
    with pytest.raises(InputError, match="Unknown stage"):
        stages.steps_between(finished, "cook", None)
    with pytest.raises(InputError, match="comes after"):
        stages.steps_between(finished, "merge", "prune")
    with pytest.raises(InputError, match="missing"):
        stages.steps_between(Run(finished.recipe, tmp_path / "new"), "prune", None)
    cleaned = Run(finished.recipe, tmp_path / "cleaned")
    for step in stages.steps_between(finished, None, None):
        if step.stage not in ("prune", "distill"):
            place = cleaned.out / step.out.relative_to(finished.out)
            place.mkdir(parents=True)
            shutil.copy(step.out / artefact.RECORD, place)
    names = [step.stage for step in stages.steps_between(cleaned, "package", None)]
    assert names[0] == "package" and names[-1] == "report"
    with pytest.raises(InputError, match=r"pruned is missing.*--from tune"):
        stages.steps_between(cleaned, "tune", None)


def test_missing_inputs_stop_a_run_before_it_starts(small_recipe: Path, tmp_path: Path) -> None:
    values = read_recipe(small_recipe).model_dump()
    values["corpus"]["source"] = str(tmp_path / "nowhere")
    run = Run(Recipe.model_validate(values), tmp_path / "out")
    with pytest.raises(InputError, match="nowhere"):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("importance", {"remove": 5}, "5 layers cannot be removed"),
        ("prune", {"layers": (1, 99)}, "99"),
    ],
)
def test_layers_that_cannot_go_stop_a_run_before_it_starts(
    small_recipe: Path, tmp_path: Path, section: str, changes: dict[str, object], said: str
) -> None:
    values = read_recipe(small_recipe).model_dump()
    values[section] |= changes
    if section == "prune":
        values["importance"] = None
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    with pytest.raises(InputError, match=said):
        stages.run_all(run, None, None, SILENT)
    with pytest.raises(InputError, match=said):
        stages.plan(run, None, None)
    assert not run.out.exists()


def test_an_empty_split_stops_a_run_before_it_starts(small_recipe: Path, tmp_path: Path) -> None:
    recipe = read_recipe(small_recipe)
    source = shutil.copytree(recipe.corpus.source, tmp_path / "source")
    (source / "artefact.json").unlink(missing_ok=True)
    kept = [each for each in read_corpus(source).segments if each.split != "test"]
    write_manifest(source, kept)
    values = recipe.model_dump()
    values["corpus"]["source"] = str(source)
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    for started in (
        lambda: stages.run_all(run, None, None, SILENT),
        lambda: stages.plan(run, None, None),
    ):
        with pytest.raises(CorpusError, match="no test segment, and the stage bench"):
            started()
    assert not run.out.exists()
    stages.plan(run, None, "package")  # none of these needs it


def test_a_contest_that_cannot_be_entered_stops_a_run_before_it_starts(
    small_recipe: Path, tmp_path: Path
) -> None:
    values = read_recipe(small_recipe).model_dump()
    values["packages"] = [{"target": "onnx", "precision": "fp32", "contest": "iwslt"}]
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    with pytest.raises(InputError, match="cannot enter IWSLT"):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()


def test_a_teacher_without_room_stops_a_run_before_it_starts(
    small_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(small_recipe)
    config = read_config(Path(str(recipe.teacher or recipe.base)))
    weights = family_for(config).count_parameters(config).total
    monkeypatch.setattr(environment, "device_bytes", lambda device: 3 * weights)
    run = Run(recipe, tmp_path / "run")
    with pytest.raises(InputError, match=r"importance loads the teacher in float32.*bfloat16"):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()


def test_a_missing_checkpoint_stops_a_run_before_it_starts(
    small_recipe: Path, tmp_path: Path
) -> None:
    values = read_recipe(small_recipe).model_dump()
    values["bench"]["quality"]["comet_checkpoint"] = str(tmp_path / "nowhere")
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    with pytest.raises(InputError, match=r"COMET checkpoint .*nowhere does not exist"):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()


def test_texts_for_a_trimmed_vocabulary(small_recipe: Path, tmp_path: Path) -> None:
    """They are an input of the package, which is made anew when they change; missing ones stop the run."""
    texts = tmp_path / "more.txt"
    values = read_recipe(small_recipe).model_dump()
    section = {"precision": "fp32", "langs": ["de"], "trim_vocab": True, "force": True}
    values["packages"] = [section | {"vocab_texts": [str(texts)]}]
    run = Run(Recipe.model_validate(values), tmp_path / "run")
    with pytest.raises(InputError, match=r"text file .*more.txt does not exist"):
        stages.run_all(run, None, None, SILENT)
    assert not run.out.exists()
    texts.write_text("Guten Tag\n")
    stages.run_all(run, None, "package", SILENT)
    (step,) = stages.steps_between(run, "package", "package")
    made = artefact.read(step.out, "package")
    assert artefact.identity(texts) in made.parents.values()
    assert "vocab_texts" not in made.recipe
    assert steps.up_to_date(step)
    few = json.loads((step.out / "package.json").read_text())["logical_parameters"]
    texts.write_text(
        "Guten Tag\nWir übersetzen heute lange Sätze über Pflanzen, Berge und Rechner\n"
    )
    assert not steps.up_to_date(step)
    stages.run_all(run, None, "package", SILENT)
    assert json.loads((step.out / "package.json").read_text())["logical_parameters"] > few


def dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a recipe's plan says."""
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe), "--dry-run"])
    assert stop.value.code == 0
    return capsys.readouterr().out


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


@pytest.mark.parametrize("name", ["qwen2-audio-7b-de", "qwen2-audio-7b-zh"])
def test_dry_run_of_the_papers_recipe_needs_no_download(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the hub id alone: parameters and bytes before and after, and what every stage needs."""
    recipe = str(ROOT / "recipes" / f"{name}.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["run", recipe, "--dry-run", "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["teacher_parameters"], found["student_parameters"]) == (
        8_397_094_912,
        6_777_929_728,
    )
    assert (found["teacher_bytes"], found["student_bytes"]) == (16_794_189_824, 13_555_859_456)
    costs = {one["stage"]: one for one in found["stages"]}
    assert set(costs) > {"teach", "importance", "prune", "distill", "tune", "merge", "report"}
    assert all(one["memory_bytes"] and one["disk_bytes"] for one in found["stages"])
    assert 67e9 < costs["teach"]["memory_bytes"] < 70e9


def test_dry_run_says_what_an_adapter_saves_in_teaching(
    tmp_path: Path,
    tiny_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Estimator, "flops", 1e11)  # else each run measures anew
    needed = {}
    for method in ("full", "lora"):
        recipe = tmp_path / f"{method}.yaml"
        recipe.write_text(
            f"lang: de\nbase: Qwen/Qwen2-Audio-7B-Instruct\n"
            f"corpus: {{source: {tiny_corpus}, format: halve}}\n"
            f"teach: {{method: {method}, weights: bfloat16}}\n"
        )
        with pytest.raises(SystemExit):
            main(["run", str(recipe), "--dry-run", "--json"])
        stages_ = json.loads(capsys.readouterr().out)["stages"]
        needed[method] = next(one for one in stages_ if one["stage"] == "teach")
    assert (
        69e9 < needed["full"]["memory_bytes"] < 72e9
    )  # weights, gradients, moments, and activations
    assert 17e9 < needed["lora"]["memory_bytes"] < 25e9
    assert needed["lora"]["time_s"] < needed["full"]["time_s"]


@pytest.mark.parametrize("prune", ["{}", "{layers: [1, 3, 6]}"])
def test_dry_run_keeps_the_layers_that_must_stay(
    prune: str, tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_gemma4(tmp_path / "model")
    (model / "model.safetensors").unlink()
    ranked = "importance: {remove: 3}\n" if prune == "{}" else ""
    recipe = tmp_path / "gemma.yaml"
    recipe.write_text(
        f"lang: de\nteacher: model\ncorpus: {{source: {tiny_corpus}, format: halve}}\n"
        f"{ranked}prune: {prune}\n"
    )
    with pytest.raises(SystemExit) as stop:
        main(["run", str(recipe), "--dry-run", "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["student_parameters"] < found["teacher_parameters"]


def test_dry_run_without_a_config_says_why(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "gone.yaml"
    recipe.write_text(
        f"lang: de\nteacher: /nowhere/at/all\ncorpus: {{source: {tiny_corpus}, format: halve}}\n"
        "prune: {layers: [1]}\n"
    )
    said = dry_run(recipe, capsys)
    assert "/nowhere/at/all is no model directory" in said
    assert "the model's config is not known" in said


def test_dry_run_says_why_speech_is_assumed(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.tsv"
    table.write_text("path\tdeutsch\nx.wav\thallo\n")
    recipe = tmp_path / "recipe.yaml"
    said = []
    for source in ("table.tsv", "nowhere.tsv"):
        recipe.write_text(
            f"lang: de\nteacher: {tiny_model}\ncorpus: {{source: {source}, format: tsv}}\n"
            "prune: {layers: [1]}\n"
        )
        said.append(dry_run(recipe, capsys))
    assert "table.tsv:1: the header is path, deutsch" in said[0]
    assert "nowhere.tsv does not exist" in said[1]


NEEDS = re.compile(r"#   (\w[\w -]*?) {2,}[\d.]+ +([\d.]+) GB +([\d.]+) GB")
"""A stage's line in a recipe's own table of costs: memory and disk."""


@pytest.mark.parametrize("name", ["qwen2-audio-7b-de", "qwen2-audio-7b-zh"])
def test_a_recipe_says_what_its_stages_need(name: str, tmp_path: Path) -> None:
    """Hours are a GPU's and cannot be held to this machine; memory and disk can."""
    recipe = ROOT / "recipes" / f"{name}.yaml"
    told = {
        stage: (float(memory), float(disk))
        for stage, memory, disk in NEEDS.findall(recipe.read_text(encoding="utf8"))
    }
    planned, _ = stages.plan(Run(read_recipe(recipe), tmp_path / "out"), None, "bench")
    needed = {one.step.name: one.cost for one in planned}
    assert list(told) == list(needed)[1:], "all but the corpus"
    for stage, (memory, disk) in told.items():
        assert disk == pytest.approx((needed[stage].disk_bytes or 0) / 1e9, abs=0.06)
        if stage == "importance":  # it keeps within two fifths of what there is
            assert 17 < (needed[stage].memory_bytes or 0) / 1e9 < memory + 0.06
        else:
            assert memory == pytest.approx((needed[stage].memory_bytes or 0) / 1e9, abs=0.06)
