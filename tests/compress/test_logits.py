"""Logit distillation: the divergence is the textbook's, the store the teacher's, and a student learns it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.collate import Branch
from compress.config import DistillConfig, TuneConfig
from compress.distill import run_distill
from compress.logits import SoftTargets, StoredLogits, divergence
from compress.rows import Row, build_sequences, read_rows, segments_for
from compress.tune import run_tune
from halve import artefact
from halve.corpus import Corpus, Segment, read_corpus
from halve.errors import ArtefactError, InputError
from halve.json_files import read_jsonl
from halve.languages import language
from halve.models import SpeechModel, load_model
from tests.compress import kills

TOP = 8
DISTIL = DistillConfig(langs=("de", "zh"), min_score=0.0, max_length_ratio=50, logits=TOP)


@pytest.fixture(scope="module")
def translations(
    tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("soft") / "translations"
    return run_distill(DISTIL, tiny_model, tiny_corpus, out).path


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_over_the_whole_vocabulary_it_is_kullback_and_leibler_s(direction: str) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 12)
    likeliest = torch.topk(functional.log_softmax(teacher, -1), 12)
    found = divergence(student, SoftTargets(likeliest.indices, likeliest.values), direction)
    pair = (functional.log_softmax(student, -1), functional.log_softmax(teacher, -1))
    if direction == "reverse":
        pair = pair[::-1]
    expected = functional.kl_div(*pair, log_target=True, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_of_few_tokens_it_is_least_for_the_teacher_itself(direction: str) -> None:
    torch.manual_seed(0)
    teacher = 3 * torch.randn(6, 40)
    likeliest = torch.topk(functional.log_softmax(teacher, -1), 4)
    targets = SoftTargets(likeliest.indices, likeliest.values)
    assert divergence(teacher, targets, direction).item() == pytest.approx(0.0, abs=1e-5)
    student = torch.zeros(6, 40, requires_grad=True)
    off = divergence(student, targets, direction)
    assert off.item() > 1
    (gradient,) = torch.autograd.grad(off, [student])
    closer = student - 0.1 * gradient
    assert divergence(closer, targets, direction).item() < off.item()


def test_the_store_holds_what_the_teacher_thinks(
    translations: Path, tiny_model: Path, tiny_corpus: Path
) -> None:
    assert not artefact.verify(translations)
    corpus, speech = read_corpus(tiny_corpus), load_model(tiny_model, device="cpu")
    segments = segments_for(corpus, "train", DISTIL.langs, None)
    rows = read_rows(translations / "rows.jsonl", segments, ("de", "zh"))
    store = StoredLogits(translations)
    for sequence in build_sequences(speech, segments, rows, share_audio=False)[::7]:
        (branch,) = sequence.branches
        soft, row = store.read([sequence]), rows[branch.row]
        expected = torch.topk(_stock(speech, corpus, segments[sequence.segment], row, branch), TOP)
        # float16, and the tower's states are kept in it too.
        torch.testing.assert_close(soft.log_probabilities, expected.values, rtol=0, atol=0.01)
        clear = expected.values[:, 0] - expected.values[:, 1] > 0.02
        assert torch.equal(soft.tokens[clear, 0], expected.indices[clear, 0])
    together = build_sequences(speech, segments[:3], rows, share_audio=True)
    apart = build_sequences(speech, segments[:3], rows, share_audio=False)
    assert torch.equal(store.read(together).tokens, store.read(apart).tokens)


def _stock(
    speech: SpeechModel, corpus: Corpus, segment: Segment, row: Row, branch: Branch
) -> Tensor:
    """Stock code's log-probabilities at the target's positions, (target, vocabulary)."""
    asked = speech.family.instruction(language(row.lang))
    inputs = speech.family.stock_inputs(
        speech.processor, corpus.audio(segment), asked, torch.float32
    )
    target = torch.tensor([branch.target])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], target], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits = speech.model(**inputs).logits[0]
    return functional.log_softmax(logits[-target.shape[1] - 1 : -1], dim=-1)


def test_a_student_learns_the_distribution_alone(
    translations: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    found = {}
    for direction in ("forward", "reverse"):
        config = TuneConfig(
            langs=("de", "zh"),
            method="lora",
            logit_weight=1.0,
            divergence=direction,
            epochs=4,
            batch_size=8,
            learning_rate=1e-3,
            select_segments=0,
            precision="float32",
        )
        pruned = _without_a_layer(tiny_model, tmp_path)
        done = run_tune(config, pruned, tiny_corpus, translations, tmp_path / direction)
        found[direction] = read_jsonl(done.path / "history.jsonl")
    for history in found.values():
        losses = [line["loss"] for line in history if "loss" in line]
        assert losses[-1] < 0.8 * losses[0]


def _without_a_layer(model: Path, folder: Path) -> Path:
    from compress.config import PruneConfig
    from compress.prune import run_prune

    out = folder / "pruned"
    return out if out.exists() else run_prune(PruneConfig(layers=(1,)), model, None, out).path


def test_what_is_missing_is_named(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    plain = DistillConfig(langs=("de",), limit=2)
    made = run_distill(plain, tiny_model, tiny_corpus, tmp_path / "plain").path
    config = TuneConfig(langs=("de",), method="lora", logit_weight=0.5)
    with pytest.raises(ArtefactError, match="no distributions"):
        run_tune(config, tiny_model, tiny_corpus, made, tmp_path / "out")
    with pytest.raises(InputError, match="no translations"):
        run_tune(config, tiny_model, tiny_corpus, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_distill_with_logits_ends_with_the_same_bytes(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = DistillConfig(langs=("de", "zh"), batch_size=4, min_score=0.0, logits=TOP)
    calm, struck = ((run_distill, (config, tiny_model, tiny_corpus, tmp_path / n)) for n in "cs")
    kills.survives(calm, struck, 2, seed=5)
    kills.same_files(tmp_path / "c", tmp_path / "s")
