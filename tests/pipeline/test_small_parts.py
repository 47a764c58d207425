"""Budgets, cuts of long audio, and words for numbers."""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.config import LatencyConfig, QualityConfig
from compress.config import ImportanceConfig
from compress.importance import run_importance
from export.config import PackageConfig
from export.package import run_package
from halve.audio import probe
from halve.errors import ArtefactError, CorpusError, InputError, RecipeError
from halve.models import family_of, read_config
from halve.progress import Progress
from pipeline import budget, console, shell
from pipeline.forms import GRAPH_BYTES
from pipeline.inspect_artefact import inspect
from pipeline.recipe import read_recipe
from pipeline.shell import spread_lists
from pipeline.stages import Run, check_inputs, plan, steps_between
from pipeline.translate import Line, Piece, _checked, _read, audible, checked, lines_of_files
from tests import tiny
from tests.families import text_models


class Told(Progress):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_a_budget_takes_the_most_layers_that_fit(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    everything = budget.choices(config, 1e9)
    assert {choice.layers for choice in everything} == {6}
    assert everything[0].package == "checkpoint bf16"  # nothing is lost where all fits
    tight = {choice.package: choice for choice in budget.choices(config, 1.2e6)}
    assert 2 <= tight["onnx int8"].layers <= tight["onnx int4"].layers == 6
    assert all(choice.stored_bytes <= 1.2e6 for choice in tight.values())
    with pytest.raises(InputError, match=r"fits.*two layers in the smallest form take"):
        budget.plan(str(tiny_model), "100kB", "de")


def test_a_choice_that_is_not_written_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="--write is not there"):
        budget.plan(str(tiny_model), "1GB", "de", choice=2)


def test_what_a_search_measured_ranks_the_choices(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    steep = budget.Table("chrf++", (40.0, 20.0, 10.0))
    small = 1.2e6
    ranked = budget.choices(config, small, measured=steep)
    scores = [choice.score for choice in ranked if choice.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert ranked[0].layers == 6  # quantised further rather than pruned
    beyond = [choice for choice in ranked if choice.score is None]
    assert ranked[-len(beyond) :] == beyond or not beyond


@pytest.mark.parametrize(("precision", "target"), [("int4", "onnx"), ("bf16", "checkpoint")])
def test_sizes_are_those_of_real_packages(precision: str, target: str, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", hidden_size=256, intermediate_size=768)
    config = json.loads((model / "config.json").read_text())
    way = {"quantise": "rtn"} if precision == "int4" else {}
    settings = PackageConfig.model_validate(
        {"target": target, "precision": precision, "langs": ["de"], **way}
    )
    run_package(settings, model, None, tmp_path / "package")
    real = sum(p.stat().st_size for p in (tmp_path / "package").rglob("*") if p.is_file())
    found = budget.choices(config, 1e9, budget._side_bytes(model))
    computed = next(one for one in found if one.settings["precision"] == precision)
    graphs = GRAPH_BYTES if target == "onnx" else 0
    assert computed.stored_bytes == pytest.approx(real, abs=graphs + 0.1 * real)


def test_a_vocabulary_that_lacks_much_is_ranked_last(tiny_model: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())

    def place(unseen_share: float) -> tuple[int, int]:
        """Where the trimmed choice stands, of how many."""
        found = budget.choices(config, 7e5, kept_tokens=64, unseen_share=unseen_share)
        (trimmed,) = [n for n, one in enumerate(found) if one.settings.get("trim_vocab")]
        return trimmed, len(found)

    assert place(0.0) == (1, 4)
    assert place(0.2) == (3, 4)


def test_a_choice_becomes_a_recipe(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    given = (str(tiny_model), "1.2MB", "de", None, tiny_corpus)
    made = budget.plan(*given, choice=2, write=recipe)
    assert "trimmed" in made.text and "are expected not to be among them" in made.text
    assert 0 < made.data["unseen_share"] < 1
    chosen = made.data["choices"][1]
    read = read_recipe(recipe)
    assert read.packages[0].target == chosen["settings"]["target"]
    removed = read.importance.remove if read.importance else 0
    assert removed == 6 - chosen["layers"]
    assert read.bench.latency is not None
    with pytest.raises(InputError, match="is there already"):
        budget.plan(*given, write=recipe)
    with pytest.raises(InputError, match="no choice 99"):
        budget.plan(*given, choice=99, write=tmp_path / "other.yaml")


def test_layers_that_a_search_has_found_are_not_searched_again(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    search = ImportanceConfig(remove=2, lang="de", segments=2)
    found = run_importance(search, tiny_model, tiny_corpus, tmp_path / "importance").path
    order = json.loads((found / "plan.json").read_text())["removed"]
    given = (str(tiny_model), "0.9MB", "de", found, tiny_corpus)
    choices = budget.plan(*given).data["choices"]
    for number, one in enumerate(choices, 1):
        recipe = tmp_path / f"{number}.yaml"
        budget.plan(*given, choice=number, write=recipe)
        read, removed = read_recipe(recipe), 6 - one["layers"]
        if 0 < removed <= 2:
            assert read.importance is None and read.prune
            assert read.prune.layers == tuple(order[:removed])
        elif removed:
            assert read.importance and read.importance.remove == removed
    assert {6 - one["layers"] for one in choices} & {1, 2}


def test_the_recipe_of_a_large_model_spares_memory(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LARGE_BYTES", 0)
    given = (str(tiny_model), "0.9MB", "de", None, tiny_corpus)
    found = budget.plan(*given).data["choices"]
    pruned = next(number for number, one in enumerate(found, 1) if one["layers"] < 6)
    budget.plan(*given, choice=pruned, write=tmp_path / "mine.yaml")
    read = read_recipe(tmp_path / "mine.yaml")
    assert read.importance and read.distill and read.tune and read.bench.latency
    assert read.importance.dtype == read.distill.dtype == "bfloat16"
    assert read.tune.checkpoint_activations and not read.bench.latency.baseline


def test_a_recipe_times_no_model_that_reads(tmp_path: Path) -> None:
    model = text_models.make_model(tmp_path / "model", "llama")
    corpus = text_models.make_corpus(tmp_path / "corpus")
    recipe = tmp_path / "mine.yaml"
    budget.plan(str(model), "1.2MB", "de", None, corpus, write=recipe)
    read = read_recipe(recipe)
    assert read.bench.quality is not None
    assert read.bench.latency is None
    timed = recipe.read_text().replace("bench:\n", "bench:\n  latency: {}\n")
    recipe.write_text(timed)
    run = Run(read_recipe(recipe), tmp_path / "out")
    for check in (
        lambda: check_inputs(run, steps_between(run, None, None)),
        lambda: plan(run, None, None),
    ):
        with pytest.raises(RecipeError, match="model reads text, and the latency bench"):
            check()


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("4GB", 4e9), ("500 MB", 5e8), ("1.5GiB", 1.5 * 2**30), ("12", 12)]
)
def test_sizes_are_read(text: str, size_bytes: float) -> None:
    assert budget.parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "much", "4 apples", "1.2.3GB"])
def test_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        budget.parse_bytes(text)


def test_long_audio_is_cut_where_it_is_silent() -> None:
    rate = 16_000
    audio = np.random.default_rng(0).normal(0, 0.1, 95 * rate).astype(np.float32)
    audio[25 * rate : 26 * rate] = 0
    parts = audible(audio, 30.0)
    assert np.array_equal(np.concatenate(parts), audio)
    assert all(len(part) <= 30 * rate for part in parts)
    assert 25 * rate <= len(parts[0]) <= 26 * rate
    assert len(audible(audio[: 30 * rate], 30.0)) == 1
    # As the server does: nothing is heard in silence, but a short recording is heard whatever it holds.
    audio[25 * rate :] = 0
    (heard,) = audible(audio, 30.0)
    assert len(heard) >= 25 * rate
    assert len(audible(np.zeros(rate, np.float32), 30.0)) == 1


def test_long_recordings_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.wav" for number in range(4)]
    for path in paths:
        soundfile.write(path, np.zeros(16_000, np.float32), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    pieces = [Piece(path.name, path) for path in paths]
    audio, fault = _read(pieces, 1.5)
    assert ([len(clip) for clip in audio], fault) == ([16_000, 16_000], None)
    audio, fault = _read([pieces[0], Piece("bad", tmp_path / "bad.wav"), pieces[1]], 60)
    assert len(audio) == 1 and fault is not None


def test_numbers_in_words() -> None:
    assert [console.duration(s) for s in (5, 120, 7200, 9e5)] == [
        "5 s",
        "2 min",
        "2.0 h",
        "10.4 days",
    ]
    assert [console.size(b) for b in (7, 2e3, 3.5e6, 4e9)] == [
        "7 bytes",
        "2.0 kB",
        "3.5 MB",
        "4.0 GB",
    ]


def test_a_table_of_another_model_ranks_nothing(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = ImportanceConfig(remove=1, lang="de", segments=2)
    found = run_importance(config, tiny_model, tiny_corpus, tmp_path / "found").path
    ranked = budget.plan(str(tiny_model), "1.2MB", "de", found)
    assert ranked.data["metric"] == "chrf++"
    for other in (
        tiny.make_model(tmp_path / "seed", seed=5),
        tiny.make_model(tmp_path / "layers", num_hidden_layers=5),
    ):
        with pytest.raises(ArtefactError, match="a plan of another model"):
            budget.plan(str(other), "1.2MB", "de", found)


def test_a_corpus_without_the_language_trims_nothing(tiny_model: Path, tiny_corpus: Path) -> None:
    with pytest.raises(CorpusError, match="has no translations into fr"):
        budget.plan(str(tiny_model), "1.2MB", "fr", None, tiny_corpus)


def test_a_recipe_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        budget._write_whole(tmp_path / "recipe.yaml", "lang: de\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("offset_s", "duration_s"),
    [(0.0, -1.0), (-1.0, 1.0), (0.0, math.nan), (math.nan, 1.0), (-math.inf, 1.0), (0.0, 0.0)],
)
def test_impossible_stretches_are_refused(
    offset_s: float, duration_s: float, tiny_corpus: Path
) -> None:
    piece = Piece("list.yaml:3", tiny_corpus / "audio" / "000.wav", offset_s, duration_s)
    with pytest.raises(
        CorpusError, match=r"list\.yaml:3: (offset|duration) .* seconds are expected"
    ):
        _checked([piece])


def test_lines_that_were_cut_are_told() -> None:
    told = Told()
    lines = [
        Line("a", "ein Satz", 1.0),
        Line("b", "ein", 1.0, "limit"),
        Line("c", "ja", 1.0, "loop"),
    ]
    assert list(checked(lines, told)) == lines
    assert told.warnings == [
        "Cut at the token limit: line 2",
        "Cut in a repetition: line 3",
    ]


@pytest.mark.parametrize("text", ["[]", "{}", '{"languages": []}', '{"languages": 5}'])
def test_packages_that_name_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"package\.json names no languages"):
        shell.language_of(tmp_path)
    with pytest.raises(ArtefactError, match=r"package\.json names no family"):
        family_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", '{"added_tokens": [{}]}', '{"model": {"vocab": {"a": "b"}}}']
)
def test_tokenizers_of_another_shape_are_named(text: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_model / "config.json", tmp_path / "config.json")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: damaged"):
        inspect(tmp_path)


@pytest.mark.parametrize("value", [None, "512", 0, 1.5, True])
def test_sizes_that_are_no_numbers_are_named(
    value: object, tiny_model: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["text_config"]["vocab_size"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match=r"config\.json is damaged .*vocab_size is"):
        read_config(tmp_path)


def test_threads_and_losses_have_limits() -> None:
    for config, values in (
        (LatencyConfig, {"lang": "de", "threads": 100_000}),
        (QualityConfig, {"lang": "de", "threads": 100_000}),
        (PackageConfig, {"max_drop": -1.0}),
    ):
        with pytest.raises(ValueError, match="or equal to"):
            config(**values)


def test_lines_come_through_a_pipe_and_not_from_a_folder(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pipe.write_text, "one\ntwo\n", encoding="utf8")
        found = lines_of_files([pipe], "en")
        written.result()
    assert [source.text for _, source in found] == ["one", "two"]
    with pytest.raises(CorpusError, match="is a folder"):
        lines_of_files([tmp_path], "en")
    with pytest.raises(CorpusError, match="is a folder"):
        probe(tmp_path)


def test_several_texts_may_follow_one_option() -> None:
    given = ["package", "--vocab-texts", "a.txt", "b.txt", "--trim-vocab"]
    wanted = ["package", "--vocab-texts", "a.txt", "--vocab-texts", "b.txt", "--trim-vocab"]
    assert spread_lists(given) == wanted
