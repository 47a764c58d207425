"""The fast search gives the tokens that stock transformers gives, one by one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress.exact import ExactTranslator
from compress.footprint import Footprint, Room
from compress.reference import StockTranslator
from compress.search import Ledger, Search, greedy, plan_chunks
from halve.models import SpeechModel
from tests.compress.search_models import opened

pytestmark = pytest.mark.usefixtures("two_threads")

SHAPES_DRAWN = int(os.environ.get("HALVE_TEST_SHAPES", "4"))
SHAPES: dict[str, dict[str, Any]] = {
    "odd": {
        "hidden_size": 60,
        "intermediate_size": 77,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "num_hidden_layers": 5,
    },
    "window": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
}


def tie(speech: SpeechModel) -> None:
    """The head becomes the embeddings: the stock class never ties them, models with equal tables do exist."""
    with torch.no_grad():
        speech.part(speech.family.head).weight.copy_(speech.part(speech.family.embeddings).weight)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """A decoder of any proportions: grouped or shared heads, odd widths, windows."""
    shared, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    layers = draw(st.integers(3, 7))
    shape = {
        "num_key_value_heads": shared,
        "num_attention_heads": shared * groups,
        "hidden_size": shared * groups * draw(st.sampled_from([6, 10, 16])),
        "intermediate_size": draw(st.integers(33, 130)),
        "num_hidden_layers": layers,
    }
    if draw(st.booleans()):
        shape |= {"use_sliding_window": True, "sliding_window": draw(st.integers(16, 64))}
        shape |= {"max_window_layers": draw(st.integers(0, layers - 1))}
    return shape


def translations(
    translator: Any, kept: list[int], drafts: list[list[int]], candidates: list[int | None]
) -> dict[int | None, list[list[int]]]:
    """Everything that a translator's run yields."""
    with translator:
        rows = range(len(translator.task.ids))
        groups = translator.groups(candidates)
        runs = translator.run(kept, drafts, groups, rows)
        return {layer: tokens for found in runs for layer, tokens in found.items()}


def test_any_shape_has_the_reference_tokens(
    tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lengths = set()

    @settings(max_examples=SHAPES_DRAWN, derandomize=True, deadline=None)
    @given(shape=shapes(), tied=st.booleans(), data=st.data())
    @example(shape=SHAPES["odd"], tied=True, data=None)
    @example(shape=SHAPES["window"], tied=False, data=None)
    def check(shape: dict[str, Any], tied: bool, data: Any) -> None:
        folder = tmp_path_factory.mktemp("shape")
        speech, task = opened(folder, tiny_corpus, seed=sum(shape.values()), segments=3, **shape)
        if tied:
            tie(speech)
        layers = list(range(len(speech.part(speech.family.layers))))
        left_out = data.draw(st.integers(0, layers[-1])) if data else 1
        candidates: list[int | None] = [left_out, layers[-2], None]
        nothing: list[list[int]] = [[] for _ in task.ids]
        wanted = translations(StockTranslator(speech, task), layers, nothing, candidates)
        parent = translations(ExactTranslator(speech, task), layers, nothing, [None])[None]
        assert parent == wanted[None], "removing nothing changes nothing"
        found = translations(ExactTranslator(speech, task), layers, parent, candidates)
        assert found == wanted
        lengths.update(len(row) for rows in wanted.values() for row in rows)

    check()
    assert len(lengths) > 3, "translations must end by themselves for this to prove anything"


def test_a_pruned_parent_too(tiny_corpus: Path, tmp_path: Path) -> None:
    speech, task = opened(tmp_path, tiny_corpus, seed=3, segments=2)
    layers = list(range(len(speech.part(speech.family.layers))))
    kept = [layer for layer in layers if layer != 1]
    nothing: list[list[int]] = [[] for _ in task.ids]
    wanted = translations(StockTranslator(speech, task), kept, nothing, [None])[None]
    assert translations(ExactTranslator(speech, task), layers, wanted, [1])[1] == wanted
    assert translations(ExactTranslator(speech, task), kept, wanted, [None])[None] == wanted


def test_no_draft_changes_the_result(tiny_corpus: Path, tmp_path: Path) -> None:
    speech, task = opened(tmp_path, tiny_corpus, seed=2)
    rows, layers = range(len(task.ids)), range(6)
    with ExactTranslator(speech, task) as translator:
        (found,) = translator.run(layers, [[] for _ in rows], [[1]], rows)
        wanted = found[1]

        @settings(max_examples=15, deadline=None)
        @given(data=st.data())
        def check(data: Any) -> None:
            drafts = []
            for row, limit in zip(wanted, task.limits, strict=True):
                agreed = data.draw(st.integers(0, len(row)))
                wild = data.draw(st.lists(st.integers(6, 500), max_size=limit - agreed))
                drafts.append([*row[:agreed], *wild])
            assert next(translator.run(layers, drafts, [[1]], rows)) == {1: wanted}

        check()


def test_same_order_as_the_reference_in_any_chunks(tiny_corpus: Path, tmp_path: Path) -> None:
    speech, task = opened(
        tmp_path, tiny_corpus, seed=5, most=12, segments=3, lang="zh", num_hidden_layers=4
    )
    tie(speech)
    rankings = []
    for name, most in (("reference", 3), ("exact", 3), ("exact", 2), ("exact", 1)):
        maker: Any = StockTranslator if name == "reference" else ExactTranslator
        ledger = Ledger(tmp_path / f"{name}-{most}.jsonl")
        with maker(speech, task) as translator:
            lengths = [len(audio) for audio in task.audio]
            room = Room(translator.footprint(), 10**9)
            chunks = plan_chunks(room.fits, lengths, most)
            search = Search(translator, task, ledger, chunks, lambda n=1, note="": None)
            rankings.append(greedy(search, 4, 2))
    assert len(rankings[0].candidates) == 2 + 1
    assert all(ranking == rankings[0] for ranking in rankings)


def test_audio_is_encoded_once_and_the_model_left_as_it_was(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech, task = opened(tmp_path, tiny_corpus)
    encoded = []
    encode = type(speech.family).encode

    def counted(*args: Any) -> torch.Tensor:
        encoded.append(args)
        return encode(*args)

    monkeypatch.setattr(type(speech.family), "encode", counted)
    attention = speech.part(speech.family.decoder).config._attn_implementation
    nothing: list[list[int]] = [[] for _ in task.ids]
    for _ in translations(ExactTranslator(speech, task), [0, 1, 2, 3, 4, 5], nothing, [1, 2, 3]):
        pass
    assert len(encoded) == len(task.ids)
    assert speech.part(speech.family.decoder).config._attn_implementation == attention
    translations(StockTranslator(speech, task, deep_copy=False), [0, 2, 5], nothing, [None])
    layers = speech.part(speech.family.layers)
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3, 4, 5]
    assert speech.part(speech.family.decoder).config.num_hidden_layers == 6


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9), st.integers(50, 200)
)
def test_chunks_hold_each_segment_once_within_the_budget(
    sizes: list[int], most: int, budget: int
) -> None:
    chunks = plan_chunks(Room(Footprint(tuple(sizes)), budget).fits, sizes, most)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(sizes)))
    assert all(len(chunk) <= most for chunk in chunks)
    assert all(sum(sizes[row] for row in chunk) <= budget for chunk in chunks)
