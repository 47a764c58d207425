"""Every family that hears goes the whole road: what is pruned, tuned, merged and packaged says what it should."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.config import ImportanceConfig, PruneConfig, TeachConfig, TuneConfig
from compress.exact import ExactTranslator
from compress.importance import make_task, run_importance
from compress.prune import run_prune
from compress.reference import StockTranslator, only_layers
from compress.teach import run_teach
from compress.tune import run_tune
from export.config import MergeConfig, PackageConfig
from export.merge import run_merge
from export.package import run_package
from export.runtime import open_translator
from halve.corpus import read_corpus
from halve.errors import FamilyError
from halve.families import FAMILIES, family_for
from halve.languages import language
from halve.models import SpeechModel, load_model, read_config
from halve.translate import TorchTranslator
from tests import tiny
from tests.families.gemma_models import make_gemma4, make_gemma4_unified
from tests.families.omni_models import make_omni
from tests.families.voxtral_models import make_voxtral

MAKERS: dict[str, tuple[Callable[..., Path], tuple[int, ...]]] = {
    "gemma4": (make_gemma4, (1, 3, 6)),
    "gemma4_unified": (make_gemma4_unified, (1, 3)),
    "qwen2_5_omni": (make_omni, (1, 3)),
    "voxtral": (make_voxtral, (1, 3)),
}
"""How a small model of each family is made, and some of its layers that may go together."""
NAMES = sorted(MAKERS)
CLIPS = [tiny.tone(duration_s, index) for index, duration_s in enumerate((1.1, 0.7, 1.9))]
LIMIT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hearing")
    return {name: make(folder / name) for name, (make, _) in MAKERS.items()}


def stock_tokens(speech: SpeechModel) -> list[list[int]]:
    """What stock `generate` says to each clip, each made by the stock processor."""
    instruction = speech.family.instruction(language("de"))
    found = []
    for clip in CLIPS:
        inputs = speech.family.stock_inputs(speech.processor, clip, instruction, torch.float32)
        found.append(speech.family.stock_generate(speech.model, inputs, max_new_tokens=LIMIT))
    return found


def own_tokens(speech: SpeechModel) -> list[list[int]]:
    """What halve says, in one batch."""
    rows = TorchTranslator(speech).translate(CLIPS, "de", limits=[LIMIT] * len(CLIPS))
    end = speech.family.end_ids(speech.model)[0]
    return [[*row.tokens, *([end] if row.stopped == "end" else [])] for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    make, removed = MAKERS[name]
    for changes in ({}, {"vocab_size": 640}):
        path = make(tmp_path / str(len(changes)), **changes)
        facts = read_config(path)
        kept = [n for n in range(family_for(facts).num_layers(facts)) if n not in removed]
        for found in (facts, family_for(facts).kept_config(facts, kept)):
            (tmp_path / "config.json").write_text(json.dumps(found))
            config = transformers.AutoConfig.from_pretrained(tmp_path)
            family = family_for(found)
            with torch.device("meta"):
                model = getattr(transformers, family.auto_class).from_config(config)
            counts = family.count_parameters(found)
            assert counts.total == sum(weight.numel() for weight in model.parameters())
            parts = ((family.layers, counts.decoder), (family.audio_tower, counts.audio_tower))
            for part, count in (*parts, (family.projector, counts.projector)):
                weights = model.get_submodule(part).parameters() if part else ()
                assert count == sum(weight.numel() for weight in weights), part


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_says_what_the_sliced_one_says(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    removed = MAKERS[name][1]
    speech = load_model(models[name])
    kept = [n for n in range(speech.family.num_layers(speech.config)) if n not in removed]
    whole = stock_tokens(speech)
    assert own_tokens(speech) == whole
    with only_layers(speech.model, speech.family, kept):
        sliced = stock_tokens(speech)
    assert sliced != whole
    assert stock_tokens(speech) == whole, "the model is as it was"
    made = run_prune(
        PruneConfig(layers=removed, verify="full"), models[name], None, tmp_path / "pruned"
    )
    assert made.extra["max_logit_difference"] < 1e-4
    pruned = load_model(tmp_path / "pruned")
    assert stock_tokens(pruned) == sliced
    assert own_tokens(pruned) == sliced


@pytest.mark.parametrize("name", NAMES)
def test_exact_importance_is_the_reference(
    name: str, models: dict[str, Path], tiny_corpus: Path
) -> None:
    speech = load_model(models[name])
    corpus = read_corpus(tiny_corpus)
    task = make_task(speech, corpus, corpus.split("select", "de", 3), "de", "chrf++")
    task = replace(task, limits=(8, 10, 12))
    rows, nothing = range(3), [[], [], []]
    first, *candidates = MAKERS[name][1]
    layers = list(range(len(speech.part(speech.family.layers))))

    def run(translator: Any, kept: list[int], drafts: Any, left_out: list[int | None]) -> Any:
        with translator:
            groups = translator.groups(left_out)
            runs = translator.run(kept, drafts, groups, rows)
            return {layer: tokens for found in runs for layer, tokens in found.items()}

    stock = StockTranslator(speech, task, deep_copy=False)
    asked = [first, *candidates, None]
    wanted = run(stock, layers, nothing, asked)
    assert run(ExactTranslator(speech, task), layers, wanted[None], asked) == wanted
    # A parent that has lost a layer, and drafts that its children share in part.
    less = [layer for layer in layers if layer != first]
    drafts = [[*tokens[:6], *tokens[:2]] for tokens in wanted[first]]
    wanted = run(stock, less, nothing, candidates)
    assert run(ExactTranslator(speech, task), less, drafts, candidates) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_qlora_merge_and_packages(
    name: str, models: dict[str, Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    teacher, adapter = models[name], tmp_path / "adapter"
    config = TuneConfig(
        langs=("de",),
        epochs=1,
        rank=4,
        alpha=8,
        learning_rate=1e-2,
        precision="float32",
        train_segments=6,
        select_segments=0,
    )
    run_tune(config, teacher, tiny_corpus, None, adapter)
    run_merge(MergeConfig(dtype="float32"), teacher, adapter, None, tmp_path / "student")
    adapted, student = load_model(teacher, adapter=adapter), load_model(tmp_path / "student")
    assert own_tokens(student) == own_tokens(adapted)
    assert own_tokens(student) != own_tokens(load_model(teacher))
    for precision in ("fp32", "nf4"):
        out = tmp_path / precision
        package = PackageConfig(
            target="checkpoint", precision=precision, langs=("de",), max_drop=100
        )
        assert run_package(package, student.path, tiny_corpus, out).extra["parity_passed"]
    translator = open_translator(tmp_path / "fp32", dtype="float32")
    rows = translator.translate(CLIPS, "de", limits=[LIMIT] * len(CLIPS))
    assert [row.tokens for row in rows] == [
        row.tokens
        for row in TorchTranslator(student).translate(CLIPS, "de", limits=[LIMIT] * len(CLIPS))
    ]
    package = PackageConfig(target="onnx", precision="fp32", langs=("de",))
    with pytest.raises(FamilyError, match=r"ONNX.*--target checkpoint"):
        run_package(package, student.path, None, tmp_path / "onnx")


@pytest.mark.parametrize("name", NAMES)
def test_teaching_reaches_what_hears(
    name: str, models: dict[str, Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    config = TeachConfig(
        langs=("de",),
        epochs=1,
        freeze_audio=False,
        learning_rate=1e-2,
        precision="float32",
        train_segments=4,
        select_segments=0,
    )
    run_teach(config, models[name], tiny_corpus, tmp_path / "teacher")
    before, after = load_model(models[name]), load_model(tmp_path / "teacher")
    assert own_tokens(after) == stock_tokens(after)
    for part in filter(None, (after.family.audio_tower, after.family.projector)):
        weights = zip(before.part(part).parameters(), after.part(part).parameters(), strict=True)
        assert any((old - new).abs().max() > 5e-3 for old, new in weights), part


@pytest.mark.parametrize("name", NAMES)
def test_branches_lose_what_single_rows_lose(
    name: str, models: dict[str, Path], tiny_corpus: Path
) -> None:
    from compress.collate import collate
    from compress.rows import Row, build_sequences
    from tests.losses import sequence_loss

    speech = load_model(models[name])
    corpus = read_corpus(tiny_corpus)
    segments = corpus.split("train")[:2]
    # Longer than any window: what lies beside a branch must not come nearer for it.
    texts = ("die Datei öffnen und das neue Menü schließen", "alt")
    rows = [Row(each.id, "de", text, "teacher") for each in segments for text in texts]

    def loss(share: bool) -> float:
        sequences = build_sequences(speech, segments, rows, share)
        states = [
            speech.family.encode(
                speech.model, speech.processor, corpus.audio(segments[each.segment])
            )
            for each in sequences
        ]
        batch = collate(sequences, [len(each) for each in states])
        return float(sequence_loss(speech, batch, torch.cat(states)).detach())

    with torch.no_grad():
        assert loss(True) == pytest.approx(loss(False), rel=1e-4)


def test_importance_proposes_only_what_may_go(
    models: dict[str, Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    config = ImportanceConfig(remove=4, lang="de", method="loss", segments=2)
    made = run_importance(config, models["gemma4"], tiny_corpus, tmp_path / "importance")
    plan = json.loads((made.path / "plan.json").read_text())
    stay = FAMILIES["gemma4"].must_stay(read_config(models["gemma4"]))
    assert not set(stay) & set(plan["removed"])
    assert set(stay) == {4, 5, 8}
    run_prune(PruneConfig(verify="full"), models["gemma4"], made.path, tmp_path / "pruned")
