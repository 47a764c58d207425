"""halve translates exactly as stock transformers does."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from halve.corpus import read_corpus
from halve.families import family_for
from halve.languages import language
from halve.models import load_model
from halve.translate import TextStream, TorchTranslator, is_looping, plan_batches
from tests import tiny

pytestmark = pytest.mark.usefixtures("two_threads")


def stock_tokens(speech, audio, lang: str, limit: int) -> list[int]:
    """What stock generate says, with the stock processor and its 30 s window."""
    family = speech.family
    inputs = family.stock_inputs(
        speech.processor, audio, family.instruction(language(lang)), torch.float32
    )
    output = speech.model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return [token for token in tokens if token not in family.end_ids(speech.model)]


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_stock_generate_batched_and_alone(
    tmp_path: Path, tiny_corpus: Path, seed: int
) -> None:
    speech = load_model(tiny.make_model(tmp_path / "model", seed=seed))
    corpus = read_corpus(tiny_corpus)
    clips = [corpus.audio(segment) for segment in corpus.split("select")]
    translator = TorchTranslator(speech)
    limits = [5 + index for index in range(len(clips))]
    expected = [
        stock_tokens(speech, clip, "de", limit) for clip, limit in zip(clips, limits, strict=True)
    ]
    together = translator.translate(clips, "de", limits=limits, batch_size=4)
    alone = translator.translate(clips, "de", limits=limits, batch_size=1)
    assert [row.tokens for row in together] == expected
    assert [row.tokens for row in alone] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "the clips must not all sound alike"


def test_large_caches_are_not_held_twice(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speech = load_model(tiny_model)
    translator = TorchTranslator(speech)
    assert translator.lanes(9, 16).size == 2 and translator.lanes(1, 16).size == 1
    monkeypatch.setattr(speech.family, "cache_width", lambda model: 2 * 32 * 4096)  # 7B
    assert translator.lanes(9, 16).size == 1


def test_valid_frames_give_the_stock_encoder_output(tiny_model: Path) -> None:
    speech = load_model(tiny_model)
    family = speech.family
    for duration_s in (0.31, 1.0, 2.013, 30.0):
        clip = tiny.tone(duration_s, 3)
        inputs = family.stock_inputs(
            speech.processor, clip, family.instruction(language("de")), torch.float32
        )
        captured: list[torch.Tensor] = []
        hook = speech.part(family.projector).register_forward_hook(
            lambda module, args, output, kept=captured: kept.append(args[0])
        )
        with torch.inference_mode():
            speech.model(**inputs)
            ours = family.encode(speech.model, speech.processor, clip)
        hook.remove()
        placeholders = (inputs["input_ids"] == speech.model.config.audio_token_id).sum().item()
        assert len(ours) == placeholders
        stock = captured[0].reshape(-1, ours.shape[1])[: len(ours)]
        assert torch.allclose(ours, stock, atol=2e-5)


def test_an_end_token_ends_the_row(tiny_model: Path, tiny_corpus: Path) -> None:
    speech = load_model(tiny_model)
    corpus = read_corpus(tiny_corpus)
    clips = [corpus.audio(segment) for segment in corpus.split("test")]
    translator = TorchTranslator(speech)
    free = translator.translate(clips, "zh", limits=[12] * len(clips))
    speech.model.generation_config.eos_token_id = free[0].tokens[3]
    ended = TorchTranslator(speech).translate(clips, "zh", limits=[12] * len(clips))
    assert ended[0].stopped == "end"
    assert ended[0].tokens == free[0].tokens[: free[0].tokens.index(free[0].tokens[3])]
    for before, after in zip(free, ended, strict=True):
        assert before.tokens[: len(after.tokens)] == after.tokens


def test_rows_leave_when_nobody_waits_for_them(tiny_model: Path) -> None:
    translator = TorchTranslator(load_model(tiny_model))
    clips = [tiny.tone(seconds, 5) for seconds in (0.5, 1.5, 1.0, 0.7)]
    limits = [30, 30, 20, 30]
    asked = Counter[int]()

    def gone(index: int) -> bool:
        asked[index] += 1
        return index == 3 or (index == 1 and asked[index] > 4)

    found = translator.translate_while(clips, "de", limits=limits, gone=gone)
    whole = translator.translate(clips, "de", limits=limits)
    assert [found[0], found[2]] == [whole[0], whole[2]]
    assert [row.stopped for row in found] == [whole[0].stopped, "gone", whole[2].stopped, "gone"]
    assert len(whole[1].tokens) > 10
    assert found[1].tokens == whole[1].tokens[:4] and found[3].tokens == []
    assert asked[1] == 5 and asked[3] == 1  # what has left is computed no further
    everyone = translator.translate_while(clips, "de", limits=limits, gone=lambda _: True)
    assert {row.stopped for row in everyone} == {"gone"}


def test_a_stream_joins_to_the_translation(tiny_model: Path) -> None:
    translator = TorchTranslator(load_model(tiny_model))
    clip = tiny.tone(1.2, 5)
    pieces = list(translator.stream(clip, "zh", limit=20))
    assert "".join(pieces) == translator.translate([clip], "zh", limits=[20])[0].text


def test_a_text_stream_never_takes_back() -> None:
    table = {1: "文", 2: "�", 3: " ", 4: "b"}
    stream = TextStream(lambda ids: "".join(table[i] for i in ids).strip())
    assert stream.push([1]) == "文"
    assert stream.push([1, 2]) == ""
    assert stream.push([1, 3]) == ""
    assert stream.push([1, 3, 4], last=True) == " b"


def test_loops_are_seen() -> None:
    assert is_looping([5, 6, 7] * 20)
    assert not is_looping(list(range(60)))
    assert not is_looping([5, 6, 7] * 10)


def test_batches_hold_every_index_once() -> None:
    batches = plan_batches([3, 9, 3, 7, 1], 2)
    assert batches == [[1, 3], [0, 2], [4]]


def test_parameters_are_counted_from_the_config(tmp_path: Path) -> None:
    for layers, vocabulary in ((2, 512), (5, 640)):
        path = tiny.make_model(
            tmp_path / f"m{layers}", num_hidden_layers=layers, vocab_size=vocabulary
        )
        speech = load_model(path)
        counts = family_for(speech.config).count_parameters(speech.config)
        assert counts.total == sum(p.numel() for p in speech.model.parameters())
