"""The attention that training uses on a CPU has the stock one's results and gradients."""

from pathlib import Path

import pytest
import torch

from compress.attention import IMPLEMENTATION, masked_attention, training_attention
from compress.collate import collate
from compress.rows import build_sequences, reference_rows, segments_for
from halve.corpus import read_corpus
from halve.models import load_model
from tests.losses import sequence_loss


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_masked_attention_is_torchs(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(2, 4, 7, 8, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, 9, 8, generator=generator)
    mask = torch.rand(2, 1, 7, 9, generator=generator) < 0.5
    mask[..., 0] = True
    found = masked_attention(query, key, value, mask, 0.3).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_has_the_loss_and_gradients_of_stock_attention(
    tiny_model: Path, tiny_corpus: Path
) -> None:
    speech = load_model(tiny_model, device="cpu")
    corpus = read_corpus(tiny_corpus)
    segments = segments_for(corpus, "train", ["de", "zh"], 3)
    sequences = build_sequences(speech, segments, reference_rows(segments, ["de", "zh"]), True)
    clips = [
        speech.family.encode(speech.model, speech.processor, corpus.audio(segment)).detach()
        for segment in segments
    ]
    batch = collate(sequences, [len(clip) for clip in clips])
    assert batch.mask is not None
    config = speech.part(speech.family.decoder).config
    before = config._attn_implementation
    weights = [weight for weight in speech.part(speech.family.layers).parameters()]

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = sequence_loss(speech, batch, torch.cat(clips))
        return [loss, *torch.autograd.grad(loss, weights)]

    expected = loss_and_gradients()
    with training_attention(speech):
        assert config._attn_implementation == IMPLEMENTATION
        found = loss_and_gradients()
    assert config._attn_implementation == before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
