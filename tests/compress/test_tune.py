"""Teaching and tuning: models learn, only what should train does, and a killed run ends the same."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress import loop, teach
from compress.config import (
    DistillConfig,
    ImportanceConfig,
    PruneConfig,
    TeachConfig,
    TuneConfig,
)
from compress.distill import run_distill
from compress.gradients import GradientMaker, gradient_threads, pieces
from compress.importance import run_importance
from compress.loop import Training, learning_rate_factor
from compress.prune import run_prune
from compress.rows import Row, build_sequences, read_rows, reference_rows, segments_for
from compress.states import LiveStates, NoStates, store_states
from compress.teach import save_model, select_weights
from compress.tune import _material, base_name, run_teach, run_tune
from export.contest import techniques
from halve import artefact
from halve.corpus import read_corpus, write_manifest
from halve.errors import ArtefactError, CorpusError, InputError
from halve.families import FAMILIES
from halve.json_files import read_jsonl, write_json
from halve.languages import language
from halve.models import load_model
from halve.origin import origin
from halve.progress import Advance, Progress
from halve.translate import TorchTranslator
from pipeline import steps
from tests import tiny
from tests.compress import kills
from tests.families.text_models import make_corpus, make_model
from tests.families.whisper_models import make_whisper


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def taught(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows four training segments by heart, in two languages."""
    out = tmp_path_factory.mktemp("taught") / "teacher"
    config = TeachConfig(
        langs=("de", "zh"),
        train_segments=4,
        epochs=45,
        eval_every=15,
        batch_size=12,
        learning_rate=3e-3,
        projector_factor=2.0,
        select_segments=0,
        precision="float32",
    )
    run_teach(config, tiny_model, tiny_corpus, out)
    return out


def history(path: Path) -> list[dict[str, float]]:
    return read_jsonl(path / "history.jsonl")


def test_a_taught_model_translates_what_it_learnt(taught: Path, tiny_corpus: Path) -> None:
    assert not artefact.verify(taught)
    losses = [line["loss"] for line in history(taught)]
    assert losses[0] > 1.0
    assert losses[-1] < 0.2
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("train", limit=4)
    translator = TorchTranslator(load_model(taught, device="cpu"))
    for lang in ("de", "zh"):
        rows = translator.translate([corpus.audio(segment) for segment in segments], lang)
        assert [row.text for row in rows] == corpus.references(segments, lang)
        assert {row.stopped for row in rows} == {"end"}


def test_a_teacher_is_an_ordinary_model_in_bfloat16(taught: Path, tiny_model: Path) -> None:
    tensors, base = (
        load_file(taught / "model.safetensors"),
        load_file(tiny_model / "model.safetensors"),
    )
    assert tensors.keys() == base.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    tower = [key for key in base if key.startswith("audio_tower.")]
    assert tower
    for key in tower:
        assert torch.equal(tensors[key], base[key].bfloat16())
    assert json.loads((taught / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_teacher_is_stored_to_translate_greedily(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    sampled = settings | {"do_sample": True, "top_k": 20, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps(sampled))
    (tmp_path / "out").mkdir()
    save_model(load_model(base), base, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert stored["do_sample"] is False and stored["eos_token_id"] == settings["eos_token_id"]
    assert not {"top_k", "repetition_penalty"} & set(stored)


class Collected(Progress):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int]] = []

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        self.tasks.append((label, done))
        yield lambda n=1, note="": self.notes.append(note)


def test_the_tower_can_train_too_and_the_best_state_is_kept(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TeachConfig(
        langs=("de",), freeze_audio=False, epochs=9, max_steps=4, eval_every=2, batch_size=6, weights="bfloat16",
        spec_mask=0.2, checkpoint_activations=True, train_segments=6, learning_rate=1e-2, select_segments=2,
    )  # fmt: skip
    progress = Collected()
    teacher = run_teach(config, tiny_model, tiny_corpus, tmp_path / "teacher", progress)
    lines = history(teacher.path)
    assert [line["step"] for line in lines] == [2, 4]
    best = max(lines, key=lambda line: line["score"])
    assert teacher.extra["score"] == best["score"]
    assert teacher.extra["origin"] == origin(tiny_model)
    assert progress.notes[-1].startswith("loss ") and ", de " in progress.notes[-1]
    tower = FAMILIES["qwen2_audio"].disk_audio_tower
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model, teacher.path))
    key = f"{tower}layers.0.fc1.weight"
    assert not torch.equal(before[key].bfloat16(), after[key])


def test_a_clock_can_end_a_run(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    config = TeachConfig(langs=("de",), epochs=1000, max_minutes=0.01, select_segments=0)
    teacher = run_teach(config, tiny_model, tiny_corpus, tmp_path / "teacher")
    assert 0 < teacher.extra["steps"] < 1000


def test_threads_share_a_batch(tiny_model: Path, tiny_corpus: Path) -> None:
    speech = load_model(tiny_model, device="cpu")
    corpus = read_corpus(tiny_corpus)
    segments = segments_for(corpus, "train", ["de"], 5)
    sequences = build_sequences(speech, segments, reference_rows(segments, ["de"]), True)
    audio = LiveStates(speech, corpus, segments)
    weights, _ = select_weights(speech, freeze_audio=False)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with gradient_threads("cpu", True) as (pool, count):
            assert count == threads
            maker = GradientMaker(
                speech, audio, list(weights.values()), 0.1, 0.0, False, pool, count
            )
            loss = maker.accumulate(sequences, seed=0)
            found.append((loss, {name: each.grad.clone() for name, each in weights.items()}))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_a_few_at_once_have_the_gradient_of_the_batch(
    tiny_model: Path, tiny_corpus: Path, threads: int, frozen: bool
) -> None:
    speech = load_model(tiny_model, device="cpu")
    corpus = read_corpus(tiny_corpus)
    segments = segments_for(corpus, "train", ["de", "zh"], 5)
    rows = reference_rows(segments, ["de", "zh"])
    sequences = build_sequences(speech, segments, rows, share_audio=True)
    audio = LiveStates(speech, corpus, segments)
    weights, _ = select_weights(speech, freeze_audio=frozen)
    found = []
    torch.set_num_threads(threads)
    try:
        for at_once in (None, 3, 1):
            with gradient_threads("cpu", True) as (pool, count):
                maker = GradientMaker(
                    speech, audio, list(weights.values()), 0.1, 0.3, False, pool, count,
                    rows_at_once=at_once,
                )  # fmt: skip
                loss = maker.accumulate(sequences, seed=0)
            found.append((loss, {name: each.grad.clone() for name, each in weights.items()}))
    finally:
        torch.set_num_threads(1)
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-3, atol=1e-5)
    assert [len(sequences[each]) for each in pieces(sequences, 3)] == [1] * 5, (
        "a clip's texts stay together"
    )
    assert [len(sequences[each]) for each in pieces(sequences, 4)] == [2, 2, 1]


def test_a_run_goes_on_in_less_memory(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TuneConfig(
        langs=("de",), method="full", epochs=1, batch_size=2, train_segments=8, select_segments=0,
        checkpoint_every=1,
    )  # fmt: skip
    save, saved = loop.save_checkpoint, []

    def killed(folder: Path, state: Any, *given: Any) -> None:
        save(folder, state, *given)
        saved.append(state.step)
        if saved == [0, 1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "out")
    less = config.model_copy(
        update={"rows_at_once": 1, "checkpoint_activations": True, "device": "cpu"}
    )
    run_tune(less, tiny_model, tiny_corpus, None, tmp_path / "out")
    assert saved == [0, 1, 2, 3, 4]
    step = steps.tune(config, tiny_model, tiny_corpus, None, tmp_path / "out")
    assert steps.up_to_date(step)


def test_a_whole_student_can_be_tuned_in_bfloat16(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = set()
    stock = loop._optimizer

    def noted(training: Training) -> Any:
        kept.update(weight.dtype for weight in training.weights.values())
        return stock(training)

    monkeypatch.setattr(loop, "_optimizer", noted)
    config = TuneConfig(
        langs=("de",), method="full", weights="bfloat16", max_steps=3, learning_rate=1e-3,
        select_segments=0, train_segments=6,
    )  # fmt: skip
    made = run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "out")
    assert kept == {torch.bfloat16} and made.extra["arithmetic"] == "bfloat16"
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model, made.path))
    assert any(not torch.equal(before[key].bfloat16(), after[key]) for key in before)
    with pytest.raises(ValueError, match="trains an adapter"):
        TuneConfig(langs=("de",), method="qlora", weights="bfloat16")
    with pytest.raises(ValueError, match="compute in bfloat16"):
        TuneConfig(langs=("de",), method="full", weights="bfloat16", precision="float32")


def test_what_was_done_before_stays_on_record(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """Pruned, taught, pruned and taught again: the statement names all of it."""
    settings: Any = {"langs": ("de",), "method": "full", "max_steps": 1, "select_segments": 0}
    plan = tmp_path / "plan.json"
    facts = {"family": "qwen2_audio", "num_layers": 6, "removed": [2], "kept": [0, 1, 3, 4, 5]}
    write_json(plan, facts | {"method": "exact"})
    first = run_prune(PruneConfig(), taught, plan, tmp_path / "first").path
    rows = run_distill(
        DistillConfig(langs=("de",), min_score=0, max_length_ratio=1000),
        taught, tiny_corpus, tmp_path / "rows",
    ).path  # fmt: skip
    tuned = run_tune(TuneConfig(**settings), first, tiny_corpus, rows, tmp_path / "tuned").path
    second = run_prune(PruneConfig(layers=(1,)), tuned, None, tmp_path / "second").path
    again = run_tune(TuneConfig(**settings), second, tiny_corpus, None, tmp_path / "again")
    assert again.extra["removed"] == [2, 1]
    assert [stage["distilled"] for stage in again.extra["tuned_before"]] == [True]
    assert not again.extra["tuned"]["distilled"]
    said = techniques(again.extra | {"precision": "bf16", "target": "checkpoint"})
    assert said == [
        "iterative decoder layer pruning and decoder layer pruning (2 layers: 2, 1)",
        "sequence-level knowledge distillation",
        "fine-tuning of all decoder weights",
    ]


def test_dropout_that_the_config_says_is_not_drawn_in_threads(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    model = tiny.make_model(tmp_path / "model", attention_dropout=0.2)
    config = TuneConfig(
        langs=("de",), method="lora", rank=8, alpha=8, max_steps=4, select_segments=0,
        learning_rate=1e-3,
    )  # fmt: skip
    torch.set_num_threads(2)
    try:
        for name in ("one", "two", "three"):
            run_tune(config, model, tiny_corpus, None, tmp_path / name)
    finally:
        torch.set_num_threads(1)
    for name in ("two", "three"):
        kills.same_files(tmp_path / "one", tmp_path / name)


@pytest.mark.parametrize("name", ["dropout", "activation_dropout", "decoder_layerdrop"])
def test_a_batch_is_split_where_nothing_is_dropped(name: str, tmp_path: Path) -> None:
    for share in (0.0, 0.1):
        speech = load_model(make_whisper(tmp_path / f"{name}-{share}", **{name: share}))
        config = TuneConfig(langs=("de",), method="full")
        training = Training(speech, config, [], NoStates([]), {}, tmp_path)
        assert loop._may_split(training) == (not share)


def test_a_text_that_whisper_has_no_places_for_is_named(tiny_corpus: Path, tmp_path: Path) -> None:
    speech = load_model(make_whisper(tmp_path / "whisper"))
    places = speech.model.config.max_target_positions
    segments = segments_for(read_corpus(tiny_corpus), "train", ["de"], 2)
    rows = [Row(segments[1].id, "de", "lang " * places, "reference")]
    with pytest.raises(CorpusError, match=f"{segments[1].id} has .*{places} places"):
        build_sequences(speech, segments, rows, share_audio=True)


def test_the_greatest_seed_is_taken(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    config = TeachConfig(
        langs=("de",), max_steps=1, spec_mask=0.2, select_segments=0, seed=2**63 - 1
    )
    teacher = run_teach(config, tiny_model, tiny_corpus, tmp_path / "teacher")
    assert math.isfinite(history(teacher.path)[0]["loss"])


def test_each_language_is_scored_on_segments_of_its_own(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    (corpus / "artefact.json").unlink()
    segments, rare = [], 0
    for segment in read_corpus(corpus).segments:
        langs = ["de", "zh"]
        if segment.split == "select":
            rare += 1
            langs = ["zh"] if rare == 2 else ["de"]
        kept = {lang: segment.references[lang] for lang in langs}
        segments.append(replace(segment, references=kept))
    write_manifest(corpus, segments)
    config = TeachConfig(langs=("de", "zh"), max_steps=1, select_segments=2)
    teacher = run_teach(config, tiny_model, corpus, tmp_path / "teacher")
    (line,) = history(teacher.path)
    assert set(line["scores"]) == {"de", "zh"}
    write_manifest(
        corpus, [each for each in segments if each.split != "select" or "de" in each.references]
    )
    with pytest.raises(CorpusError, match="no select segment with a zh reference"):
        run_teach(config, tiny_model, corpus, tmp_path / "refused")


def test_states_are_kept_between_runs(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    config = TeachConfig(langs=("de",), max_steps=1, select_segments=2)
    done = []
    for name in ("one", "two"):
        progress = Collected()
        run_teach(
            config,
            tiny_model,
            tiny_corpus,
            tmp_path / name,
            progress,
            states_dir=tmp_path / "states",
        )
        done.append([count for label, count in progress.tasks if label == "Encoding audio"])
    assert done == [[0, 0], [12, 2]]
    kills.same_files(tmp_path / "one", tmp_path / "two")


def test_states_are_of_their_front_end(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech, corpus = load_model(tiny_model), read_corpus(tiny_corpus)
    segments = corpus.split("train")[:2]
    counted = []
    for hop_length in (160, 160, 200):
        monkeypatch.setattr(speech.processor.feature_extractor, "hop_length", hop_length)
        progress = Collected()
        store_states(speech, corpus, segments, tmp_path, progress)
        counted.append([count for label, count in progress.tasks if "Encoding" in label])
    assert counted == [[0], [2], [0]], "frames of another length are other states"


def test_two_that_want_the_same_states_make_them_once(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    speech, corpus = load_model(tiny_model), read_corpus(tiny_corpus)
    segments = corpus.split("train")
    seen = [Collected(), Collected()]
    with ThreadPoolExecutor(2) as pool:
        stores = list(
            pool.map(lambda each: store_states(speech, corpus, segments, tmp_path, each), seen)
        )
    counts = sorted(count for each in seen for label, count in each.tasks if "Encoding" in label)
    assert counts == [0, len(segments)], "the second one began with all of them done"
    for number in range(len(segments)):
        assert torch.equal(stores[0].read(number), stores[1].read(number))


@pytest.fixture(scope="module")
def adapter(taught: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QLoRA adapter that has learnt all twelve training segments."""
    out = tmp_path_factory.mktemp("tuned") / "adapter"
    config = TuneConfig(
        langs=("de",), epochs=12, batch_size=6, learning_rate=3e-3, rank=8, alpha=16, eval_every=12,
        select_segments=3,
    )  # fmt: skip
    run_tune(config, taught, tiny_corpus, None, out)
    return out


def test_qlora_trains_an_adapter_of_the_decoder_alone(adapter: Path, taught: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    layers = "base_model.model.model.language_model.layers."
    assert {name.split(".lora_")[0].removeprefix(layers) for name in tensors} == {
        f"{layer}.{part}"
        for layer in range(6)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == taught.name
    assert settings["use_rslora"] and settings["r"] == 8 and settings["lora_alpha"] == 16
    record = artefact.read(adapter, "adapter")
    assert record.extra["trainable_parameters"] == sum(each.numel() for each in tensors.values())
    lines = history(adapter)
    assert lines[0]["step"] == 0 and "loss" not in lines[0]
    assert lines[-1]["loss"] < lines[1]["loss"]
    assert record.extra["score"] == max(line["score"] for line in lines)


def test_stock_peft_loads_the_adapter(adapter: Path, taught: Path, tiny_corpus: Path) -> None:
    from peft import PeftModel

    base = load_model(taught, dtype="bfloat16", quantization="nf4", device="cpu")
    PeftModel.from_pretrained(base.model, str(adapter))
    corpus = read_corpus(tiny_corpus)
    translator = TorchTranslator(base)
    rows = translator.translate(
        [corpus.audio(each) for each in corpus.split("select", limit=2)], "de"
    )
    assert all(row.tokens for row in rows)


def test_tuning_never_ends_worse_than_it_began(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TuneConfig(
        langs=("de",), method="lora", epochs=50, batch_size=6, learning_rate=1.0, rank=4,
        clip_norm=0.0, eval_every=1, patience=2, select_segments=3, precision="float32",
    )  # fmt: skip
    try:
        tuned = run_tune(config, taught, tiny_corpus, None, tmp_path / "adapter")
    except InputError as error:  # so large a step may also leave the numbers
        assert "learning rate" in str(error)
        return
    assert tuned.extra["best_step"] == 0 or tuned.extra["score"] > tuned.extra["untuned_score"]
    assert tuned.extra["steps"] < 100


def test_full_tuning_writes_a_student(taught: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    translations = tmp_path / "translations"
    run_distill(DistillConfig(langs=("de",), limit=6), taught, tiny_corpus, translations)
    config = TuneConfig(langs=("de",), method="full", max_steps=2, select_segments=0)
    student = run_tune(config, taught, tiny_corpus, translations, tmp_path / "student")
    assert student.kind == "student"
    assert student.extra["rows"]["reference"] == 6
    load_model(student.path, device="cpu")


def test_translations_of_another_language_are_refused(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    run_distill(DistillConfig(langs=("de",), limit=2), taught, tiny_corpus, tmp_path / "de")
    config = TuneConfig(langs=("zh",), max_steps=1)
    with pytest.raises(CorpusError, match="has no row"):
        run_tune(config, taught, tiny_corpus, tmp_path / "de", tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de"]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_rises_then_falls_to_zero(schedule: str) -> None:
    config = TeachConfig.model_validate({"langs": ["de"], "schedule": schedule, "warmup": 0.1})
    factors = [learning_rate_factor(config, step / 100) for step in range(101)]
    assert factors[0] == 0 and math.isclose(factors[100], 0, abs_tol=1e-9)
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_a_base_is_named_without_its_place(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2-Audio-7B" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert base_name(snapshot) == "Qwen/Qwen2-Audio-7B"
    assert base_name(tmp_path / "pruned" / ".." / "pruned") == "pruned"


KILLS = int(os.environ.get("HALVE_TEST_KILLS", "3"))


def test_a_killed_teach_ends_with_the_same_bytes(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TeachConfig(
        langs=("de", "zh"), epochs=3, batch_size=4, checkpoint_every=2, eval_every=8,
        select_segments=2, learning_rate=2e-3, spec_mask=0.2, precision="float32",
    )  # fmt: skip
    calm, struck = ((run_teach, (config, tiny_model, tiny_corpus, tmp_path / n)) for n in "cs")
    kills.survives(calm, struck, KILLS, seed=1)
    kills.same_files(tmp_path / "c", tmp_path / "s")


def test_a_killed_tune_ends_with_the_same_bytes(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TuneConfig(
        langs=("de",), epochs=3, batch_size=4, checkpoint_every=2, eval_every=4,
        select_segments=2, rank=4, dropout=0.1, learning_rate=1e-3, train_segments=8,
    )  # fmt: skip
    calm, struck = ((run_tune, (config, taught, tiny_corpus, None, tmp_path / n)) for n in "cs")
    kills.survives(calm, struck, KILLS, seed=2)
    kills.same_files(tmp_path / "c", tmp_path / "s")


def test_translations_of_another_corpus_are_refused(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    run_distill(DistillConfig(langs=("de",), limit=2), taught, tiny_corpus, tmp_path / "made")
    # Its segments have the same ids.
    other = tiny.make_corpus(tmp_path / "other", train=11)
    config = TuneConfig(langs=("de",), method="lora", max_steps=1)
    with pytest.raises(ArtefactError, match="another corpus"):
        run_tune(config, taught, other, tmp_path / "made", tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "other"]


def test_a_sample_of_translations_without_a_language_is_refused(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = read_corpus(tiny_corpus)
    ids = [segment.id for segment in corpus.split("train")]
    rows = [{"id": one, "lang": "de", "text": "ja", "origin": "teacher"} for one in ids]
    rows.append({"id": ids[1], "lang": "zh", "text": "是", "origin": "teacher"})
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = TuneConfig(langs=("de", "zh"))
    segments, chosen = _material(config, corpus, tmp_path)
    assert (len(segments), len(chosen)) == (len(ids), len(rows))
    few = config.model_copy(update={"train_segments": 2})
    with pytest.raises(CorpusError, match="Of 2 train segments none has a text in zh"):
        _material(few, corpus, tmp_path)


def test_untranslated_speech_is_learnt_from(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = shutil.copytree(tiny_corpus, tmp_path / "corpus")
    segments = [
        replace(each, references={}) if each.split == "train" else each
        for each in read_corpus(tiny_corpus).segments
    ]
    write_manifest(corpus, segments)
    distil = DistillConfig(langs=("de",), untranslated=True, logits=2)
    made = run_distill(distil, taught, corpus, tmp_path / "translations")
    config = TuneConfig(
        langs=("de",), method="lora", max_steps=3, batch_size=4, rank=4, select_segments=2,
        logit_weight=0.5,
    )  # fmt: skip
    tuned = run_tune(config, taught, corpus, made.path, tmp_path / "adapter")
    assert tuned.extra["rows"] == {"teacher": made.extra["rows"]}
    assert tuned.extra["rows"]["teacher"] > 8, "the taught model says something of nearly all"
    with pytest.raises(CorpusError, match="no train segment with a de reference"):
        run_tune(
            config.model_copy(update={"logit_weight": 0.0}), taught, corpus, None, tmp_path / "b"
        )


@pytest.mark.parametrize("rank", [65, 100_000])
def test_a_rank_that_no_layer_has_is_refused(
    rank: int, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TuneConfig(langs=("de",), method="lora", rank=rank, max_steps=1)
    with pytest.raises(InputError, match=r"--rank of at most 64"):
        run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["full", "lora", "tune"])
def test_a_model_stored_in_4_bits_is_not_trained_in_full(
    method: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """It would train to the end, and could not be saved."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    facts = json.loads((base / "config.json").read_text())
    facts["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"stored quantised \(bitsandbytes\).*To mend it"):
        if method == "tune":
            tuning = TuneConfig(langs=("de",), method="full")
            run_tune(tuning, base, tiny_corpus, None, tmp_path / "out")
        else:
            teaching = TeachConfig.model_validate({"langs": ["de"], "method": method})
            run_teach(teaching, base, tiny_corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_steps_for_a_projector_that_is_not_there_are_refused(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeachConfig(langs=("de",), method="lora", projector_only_steps=5)
    with pytest.raises(InputError, match=r"in 5 steps .* nothing would train"):
        run_teach(config, tiny_model, tiny_corpus, tmp_path / "out")
    monkeypatch.setattr(teach, "open_states", None)  # nothing is encoded first
    whisper = make_whisper(tmp_path / "whisper")
    config = TeachConfig(langs=("de",), projector_only_steps=5)
    with pytest.raises(InputError, match="whisper model has no projector"):
        run_teach(config, whisper, tiny_corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["whisper"]


def test_what_an_adapter_does_not_train_is_told(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    told = Told()
    config = TeachConfig(
        langs=("de",), method="lora", rank=4, max_steps=1, select_segments=0, train_segments=2,
        freeze_audio=False, projector_factor=2.0,
    )  # fmt: skip
    run_teach(config, tiny_model, tiny_corpus, tmp_path / "out", told)
    assert [warning.split()[0] for warning in told.warnings] == [
        "--no-freeze-audio",
        "--projector-factor",
    ]


class Told(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_speech_that_is_not_english_is_told_once(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    corpus = read_corpus(tiny_corpus)
    with artefact.writing(tmp_path / "czech", "corpus", {}, 0, {}) as draft:
        shutil.copytree(tiny_corpus / "audio", draft.path / "audio")
        write_manifest(draft.path, [replace(each, source_lang="cs") for each in corpus.segments])
    small = {"select_segments": 0, "train_segments": 2, "max_steps": 1}
    stages = {
        "importance": lambda out, told: run_importance(
            ImportanceConfig(remove=1, lang="de", method="random"), tiny_model, out[0], out[1], told
        ),
        "distill": lambda out, told: run_distill(
            DistillConfig(langs=("de",), limit=1), tiny_model, out[0], out[1], told
        ),
        "teach": lambda out, told: run_teach(
            TeachConfig.model_validate({"langs": ["de"], **small}), tiny_model, *out, told
        ),
        "tune": lambda out, told: run_tune(
            TuneConfig.model_validate({"langs": ["de"], "method": "lora", "rank": 4, **small}),
            tiny_model, out[0], None, out[1], told,
        ),
    }  # fmt: skip
    for name, run in stages.items():
        told = Told()
        run((tmp_path / "czech", tmp_path / name), told)
        assert len([one for one in told.warnings if "spoken in cs" in one]) == 1, name
    told = Told()
    stages["importance"]((tiny_corpus, tmp_path / "english"), told)
    assert not told.warnings


def test_a_transcript_is_asked_for_in_its_own_language(tiny_model: Path, tiny_corpus: Path) -> None:
    speech = load_model(tiny_model)
    segment = replace(read_corpus(tiny_corpus).split("train")[0], source_lang="cs")
    rows = reference_rows([segment], (), transcribe=True)
    (sequence,) = build_sequences(speech, [segment], rows, True)
    asked = speech.family.transcription(language("cs"))
    head, tail = speech.family.prompt_ids(speech.processor, asked)
    assert (sequence.head, sequence.branches[0].tail) == (tuple(head), tuple(tail))
    assert "Czech" in asked


@pytest.mark.parametrize(
    "row",
    [[1], {"id": "s000", "lang": "de"}, {"id": "s000", "lang": "de", "text": 5, "origin": "x"}],
)
def test_rows_of_another_shape_are_named(row: object, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ArtefactError, match=r"rows\.jsonl, line 1: no training row"):
        read_rows(tmp_path / "rows.jsonl", [], ("de",))


def test_translations_in_one_language_do_not_tune_another(
    taught: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    distilled = DistillConfig(langs=("de",), min_score=0, max_length_ratio=1000, limit=4)
    translations = run_distill(distilled, taught, tiny_corpus, tmp_path / "translations").path
    config = TuneConfig(langs=("de", "zh"), max_steps=1, select_segments=0, rank=4)
    with pytest.raises(CorpusError, match="no row for this corpus in zh"):
        run_tune(config, taught, tiny_corpus, translations, tmp_path / "both")
    # Of the four that were translated, three: not those of a sample of all that happen to be among them.
    told = Told()
    config = TuneConfig(langs=("de",), max_steps=1, select_segments=0, rank=4, train_segments=3)
    run_tune(config, taught, tiny_corpus, translations, tmp_path / "three", told)
    assert any(line.startswith("3 segments, ") for line in told.lines)
    assert not any("0 rows" in line for line in told.lines)


@pytest.mark.parametrize("stage", ["teach", "tune"])
def test_a_model_that_reads_is_not_trained_on_nothing(stage: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", "llama")
    corpus = make_corpus(tmp_path / "corpus")
    path = corpus / "manifest.jsonl"
    lines = [line | {"source_text": ""} for line in read_jsonl(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CorpusError, match="has no source text"):
        if stage == "teach":
            run_teach(TeachConfig(langs=("de",), max_steps=1), model, corpus, tmp_path / "out")
        else:
            config = TuneConfig(langs=("de",), max_steps=1, rank=4)
            run_tune(config, model, corpus, None, tmp_path / "out")


def test_a_model_that_reads_has_nothing_to_transcribe(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", "llama")
    corpus = make_corpus(tmp_path / "corpus")
    config = TeachConfig(langs=("de",), max_steps=1, transcribe=True)
    with pytest.raises(InputError, match="--transcribe"):
        run_teach(config, model, corpus, tmp_path / "out")


def test_a_run_goes_on_where_checkpoints_are_written_more_often(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    made = []
    for every in (1, 7):
        config = TuneConfig(
            langs=("de",), max_steps=2, rank=4, select_segments=0, checkpoint_every=every
        )
        made.append(run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "adapter"))
    assert made[0].fingerprint == made[1].fingerprint


def test_a_score_holds_a_batch_at_a_time(
    tiny_model: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = load_model(tiny_model)
    corpus = read_corpus(tiny_corpus)
    segments = segments_for(corpus, "train", ["de"], 5)
    audio, places = LiveStates(speech, corpus, segments), range(5)
    whole = teach.select_score(speech, segments, audio, places, "de")
    together = []
    translate = TorchTranslator.translate_embeddings

    def counted(self: TorchTranslator, embeddings, *given, **named):
        together.append(len(embeddings))
        return translate(self, embeddings, *given, **named)

    monkeypatch.setattr(TorchTranslator, "translate_embeddings", counted)
    monkeypatch.setattr(teach, "SCORE_BATCH", 2)
    # A near tie of a random model may fall otherwise in another batch.
    found = teach.select_score(speech, segments, audio, places, "de")
    assert found == pytest.approx(whole, abs=5)
    assert together == [2, 2, 1]


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_gradients_that_are_no_numbers_reach_no_weight(
    taught: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clip_norm: float,
) -> None:
    """The loss may be a number all the same: the run ends, and what it goes on from is sound."""
    accumulate, steps = GradientMaker.accumulate, []

    def spoilt(self: GradientMaker, *arguments: Any) -> float:
        loss = accumulate(self, *arguments)
        steps.append(loss)
        if len(steps) == 2:
            gradient = self.weights[0].grad
            assert gradient is not None
            gradient[0] = float("nan")
        return loss

    config = TuneConfig(
        langs=("de",),
        method="lora",
        rank=4,
        max_steps=3,
        checkpoint_every=1,
        select_segments=0,
        clip_norm=clip_norm,
    )
    asked = (config, taught, tiny_corpus, None)
    run_tune(*asked, tmp_path / "calm")
    monkeypatch.setattr(GradientMaker, "accumulate", spoilt)
    with pytest.raises(InputError, match="gradients' norm of step 2 is nan"):
        run_tune(*asked, tmp_path / "struck")
    run_tune(*asked, tmp_path / "struck")
    weights = [tmp_path / name / "adapter_model.safetensors" for name in ("calm", "struck")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
