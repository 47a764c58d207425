"""Layout of training batches: the loss is where it should be, and sharing the audio changes nothing."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.collate import Branch, TrainingSequence, collate, plan_epoch, span_mask
from compress.rows import build_sequences, end_token, reference_rows, segments_for
from halve.corpus import read_corpus
from halve.models import SpeechModel, load_model
from tests.losses import sequence_loss

ONE = TrainingSequence(0, (1, 2), (Branch((3, 4), (10, 11, 5)),))
TWO = TrainingSequence(1, (1, 2), (Branch((3, 4), (20, 5)), Branch((6,), (21, 22, 5))))


@pytest.fixture(scope="module")
def speech(tiny_model: Path) -> SpeechModel:
    return load_model(tiny_model, device="cpu")


def test_one_branch_is_laid_out_as_a_plain_row() -> None:
    batch = collate([ONE], [3])
    assert batch.ids.tolist() == [[1, 2, 0, 0, 0, 3, 4, 10, 11]]
    assert batch.is_audio.tolist() == [[False] * 2 + [True] * 3 + [False] * 4]
    assert batch.mask is None
    # The last prompt token predicts the first target token; the end token is predicted, never fed.
    assert batch.places.tolist() == [6, 7, 8]
    assert batch.labels.tolist() == [10, 11, 5]


def test_branches_count_on_from_the_shared_part_and_do_not_see_each_other() -> None:
    batch = collate([ONE, TWO], [3, 2])
    assert batch.ids[1].tolist() == [1, 2, 0, 0, 3, 4, 20, 6, 21, 22]
    assert batch.positions[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert batch.places.tolist() == [6, 7, 8, 15, 16, 17, 18, 19]
    assert batch.labels.tolist() == [10, 11, 5, 20, 5, 21, 22, 5]
    assert batch.mask is not None
    assert batch.mask[1, 0, 8].tolist() == [True] * 4 + [False] * 3 + [True] * 2 + [False]
    assert batch.mask.any(-1).all()


def test_sharing_the_audio_gives_the_same_loss_and_gradient(
    speech: SpeechModel, tiny_corpus: Path
) -> None:
    corpus = read_corpus(tiny_corpus)
    segments = segments_for(corpus, "train", ["de", "zh"], 3)
    rows = reference_rows(segments, ["de", "zh"], transcribe=True)
    clips = [
        speech.family.encode(speech.model, speech.processor, corpus.audio(segment)).detach()
        for segment in segments
    ]
    found = []
    for share in (True, False):
        sequences = build_sequences(speech, segments, rows, share)
        assert len(sequences) == (3 if share else 9)
        states = [clips[sequence.segment] for sequence in sequences]
        batch = collate(sequences, [len(clip) for clip in states])
        speech.model.zero_grad()
        loss = sequence_loss(speech, batch, torch.cat(states), label_smoothing=0.1)
        torch.autograd.backward(loss)
        gradient = speech.part(speech.family.layers)[0].mlp.up_proj.weight.grad.clone()
        found.append((loss.item(), gradient))
    (shared, shared_gradient), (apart, apart_gradient) = found
    assert shared == pytest.approx(apart, rel=1e-5)
    torch.testing.assert_close(shared_gradient, apart_gradient, rtol=1e-3, atol=1e-5)


def test_the_loss_is_that_of_the_stock_model(speech: SpeechModel, tiny_corpus: Path) -> None:
    corpus = read_corpus(tiny_corpus)
    segments = segments_for(corpus, "train", ["de"], 1)
    text = segments[0].references["de"]
    sequences = build_sequences(speech, segments, reference_rows(segments, ["de"]), True)
    audio = corpus.audio(segments[0])
    states = speech.family.encode(speech.model, speech.processor, audio)
    with torch.no_grad():
        loss = sequence_loss(speech, collate(sequences, [len(states)]), states)
        inputs = speech.family.stock_inputs(
            speech.processor, audio, "Translate the English speech into German:", torch.float32
        )
        target = speech.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        target = torch.tensor([[*target, end_token(speech)]])
        prompt = inputs["input_ids"]
        inputs["input_ids"] = torch.cat([prompt, target], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = speech.model(**inputs).logits[0]
        learnt = logits[-target.shape[1] - 1 : -1]
        expected = torch.nn.functional.cross_entropy(learnt, target[0])
    assert loss.item() == pytest.approx(expected.item() * target.shape[1], rel=1e-4)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), min_size=1, max_size=60),
    st.integers(1, 12),
)
def test_an_epoch_has_every_sequence_once(shapes: list[tuple[int, int]], size: int) -> None:
    lengths, rows = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
    plans = [
        plan_epoch(lengths, rows, size, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1]
    for plan in plans:
        assert sorted(number for batch in plan for number in batch) == list(range(len(shapes)))
        for batch in plan:
            assert len(batch) == 1 or sum(rows[number] for number in batch) <= size


def test_blanked_spans_are_about_the_share_asked_for() -> None:
    mask = span_mask([200, 3] * 50, 0.2, torch.Generator().manual_seed(0))
    assert mask.shape == (50 * 203,)
    assert 0.12 < mask.float().mean() < 0.25
