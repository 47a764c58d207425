"""What the search plans to take in memory is what it takes."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress import lanes
from compress.config import ImportanceConfig
from compress.exact import DECODED_TOGETHER, ExactTranslator, Pack
from compress.footprint import Footprint, Room, checked, rows_that_fit
from compress.importance import default_gpu_budget, run_importance
from compress.lanes import LanePool
from compress.packing import PackedRows
from compress.racing import stratify
from compress.search import plan_chunks
from halve import environment
from halve.errors import InputError
from halve.families import Family
from halve.models import load_model
from tests.compress.search_models import opened

pytestmark = pytest.mark.usefixtures("two_threads")


def allocated(pool: LanePool) -> int:
    """Bytes of the buffers that a pool has made."""
    pairs = [
        pair for slots in pool._slots for part in slots.bins for pair in part._buffers.values()
    ]
    return sum(buffer.nbytes for pair in pairs for buffer in pair)


@pytest.mark.parametrize("cut", [stratify, plan_chunks])
def test_buffers_of_unlike_rows_are_within_the_budget(
    cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lanes.BINS, "meta", lanes.BINS["cuda"])
    device, budget = torch.device("meta"), 32 * 10**9
    layers, heads, dim = range(32), 32, 128  # Qwen2-Audio-7B in two bytes
    of_position = 2 * 2 * len(layers) * heads * dim
    seconds = np.minimum(30, 5 * np.random.default_rng(0).lognormal(sigma=0.8, size=400))
    positions = tuple(60 + int(40 * s) for s in seconds)
    pool = LanePool(1, torch.bfloat16, device)
    needs = Footprint(
        rows=tuple(2 * of_position * count for count in positions),
        positions=positions,
        position_bytes=DECODED_TOGETHER * of_position,
        lanes=pool.size,
        bins=pool.bins,
    )
    chunks = cut(Room(needs, budget).fits, [int(1000 * s) for s in seconds], 128)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(400))
    source = PackedRows([1])
    for layer in layers:
        source.keys[layer] = source.values[layer] = torch.empty(
            heads, 1, dim, dtype=torch.bfloat16, device=device
        )
    taken = []
    for chunk in chunks:
        pool.free()
        for lane in pool.lanes({row: positions[row] for row in chunk}, DECODED_TOGETHER).values():
            for part in lane.slots.bins:
                part.prepare(source, layers)
        taken.append(allocated(pool) + sum(needs.rows[row] for row in chunk))
        assert taken[-1] == needs.most([chunk])
    assert 0.9 * budget < max(taken) <= budget


def test_racing_takes_no_more_than_the_budget(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lanes.BINS, "cpu", 1)
    speech, task = opened(tmp_path, tiny_corpus, segments=6, num_hidden_layers=7)
    task = replace(task, limits=(600, 600, 6, 6, 6, 6))
    translator = ExactTranslator(speech, task)
    packed: list[Pack] = []
    branches: list[PackedRows] = []
    pack, branch = translator.pack, translator.branch

    def packing(*arguments: Any) -> list[Pack]:
        packed[:] = pack(*arguments)
        return packed

    def branching(*arguments: Any) -> Any:
        hidden, rows = branch(*arguments)
        branches[:] = [rows]
        return hidden, rows

    monkeypatch.setattr(translator, "pack", packing)
    monkeypatch.setattr(translator, "branch", branching)

    def most(chunks: Sequence[Sequence[int]]) -> int:
        """What there is after each group of each chunk, at most, the encoded segments aside."""
        found = 0
        with translator:
            for rows in chunks:
                drafts: list[list[int]] = [[] for _ in rows]
                for _ in translator.run(range(7), drafts, [[1, 2, 3, 4, 5], [None]], rows):
                    kept = [*branches, *(one.attention for one in packed)]
                    tensors = [one.hidden for one in packed]
                    tensors += [states for one in kept for states in one.keys.values()]
                    tensors += [states for one in kept for states in one.values.values()]
                    found = max(found, allocated(translator._pool) + sum(t.nbytes for t in tensors))
        return found

    together = most([range(6)])
    lengths = [len(audio) for audio in task.audio]
    needs = replace(translator.footprint(), held=0)
    assert together <= needs.most([range(6)])
    budget = together - 1
    alone = [needs.most([[row]]) for row in range(6)]
    assert sum(alone) + max(alone) <= budget, "at their own lengths they would fit together"
    chunks = stratify(Room(needs, budget).fits, lengths, 99)
    assert len(chunks) > 1
    assert most(chunks) <= budget
    assert stratify(Room(needs, 10**9).fits, lengths, 99) == [
        sorted(range(6), key=lambda row: (-lengths[row], row))
    ]


def test_the_first_parts_of_bounded_are_one_where_they_fit() -> None:
    lengths = list(range(36))
    whole = stratify(lambda chunks: True, lengths, 99, "bounded")
    assert [len(chunk) for chunk in whole] == [24, 6, 6]
    assert sorted(row for chunk in whole for row in chunk) == lengths
    small = stratify(lambda chunks: max(map(len, chunks)) < 20, lengths, 99, "bounded")
    assert [len(chunk) for chunk in small] == [6] * 6
    assert [len(chunk) for chunk in stratify(lambda chunks: True, lengths, 99)] == [9] * 4


def test_chunks_fit_into_every_worker() -> None:
    rooms = [Room(Footprint((2, 3, 4)), 7), Room(Footprint((1, 1, 1)), 2)]
    assert plan_chunks(checked(rooms, "abc"), [2, 3, 4], 99) == [[2, 1], [0]]
    with pytest.raises(InputError, match="Segment c alone takes"):
        checked([*rooms, Room(Footprint((2, 3, 4)), 3)], "abc")


def test_encoded_segments_are_of_the_budget(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    speech, task = opened(tmp_path, tiny_corpus, segments=6)
    translator = ExactTranslator(speech, task)
    needs = translator.footprint()
    assert needs.held == sum(prompt.nbytes for prompt in translator._prompts) > 0
    assert translator.footprint(decodes=False).held == needs.held
    lengths, alone = [len(audio) for audio in task.audio], replace(needs, held=0)
    budget = alone.most([range(6)])
    assert len(plan_chunks(Room(alone, budget).fits, lengths, 99)) == 1
    assert len(plan_chunks(Room(needs, budget).fits, lengths, 99)) > 1
    assert len(plan_chunks(Room(needs, budget + needs.held).fits, lengths, 99)) == 1
    with pytest.raises(InputError, match="of encoded segments"):
        Room(needs, max(alone.most([[row]]) for row in range(6))).check(task.ids)
    for method in ("exact", "loss"):
        config = ImportanceConfig(remove=1, lang="de", method=method, memory_gb=needs.held / 1e9)
        with pytest.raises(InputError, match=r"takes .* beside 0\.\d+ GB of encoded segments, and"):
            run_importance(config, tiny_model, tiny_corpus, tmp_path / "out")


def test_what_a_prompt_is_made_of_goes_with_it(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech, task = opened(tmp_path, tiny_corpus, segments=6)
    taken: list[Any] = []
    left: list[int] = []
    take_in, embed_prompt = Family.take_in, Family.embed_prompt

    def noted(*arguments: Any) -> Any:
        states = take_in(*arguments)
        taken.append(weakref.ref(states))
        return states

    def counted(*arguments: Any) -> Any:
        left.append(sum(reference() is not None for reference in taken))
        return embed_prompt(*arguments)

    monkeypatch.setattr(Family, "take_in", noted)
    monkeypatch.setattr(Family, "embed_prompt", counted)
    ExactTranslator(speech, task)
    assert left == [6, 5, 4, 3, 2, 1]


def test_a_gpu_holds_what_is_worked_on_alone(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech, task = opened(tmp_path, tiny_corpus, segments=2)
    width = next(speech.part(speech.family.projector).parameters()).shape[1]
    # The meta device stands in for a GPU; it has no numbers to copy.
    speech.model.to("meta")
    monkeypatch.setattr(
        type(speech.family), "encode", lambda *_: torch.empty(20, width, device="meta")
    )
    monkeypatch.setattr(torch.Tensor, "cpu", lambda states: torch.zeros(states.shape))
    translator = ExactTranslator(speech, task)
    assert {prompt.device.type for prompt in translator._prompts} == {"cpu"}
    assert translator.footprint().held == 0
    (pack,) = translator.pack([0, 1], [[7, 8, 9], [5, 6]])
    assert pack.hidden.device.type == "meta"


@pytest.mark.parametrize(
    ("total_gb", "model_gb", "budget_gb"),
    [(80, 16.8, 32), (24, 16.8, 3.6), (48, 33.6, 7.2), (16, 16.8, 0)],
)
def test_the_budget_on_a_gpu_leaves_room_for_model_and_activations(
    total_gb: float, model_gb: float, budget_gb: float
) -> None:
    found = default_gpu_budget(int(total_gb * 1e9), int(model_gb * 1e9))
    assert found == pytest.approx(budget_gb * 1e9, abs=2)


def test_a_gpu_translates_as_many_rows_as_it_holds(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = load_model(tiny_model)
    held = sum(weight.nbytes for weight in speech.model.parameters())
    row = speech.family.cache_width(speech.model) * 4 * (100 + 64)
    assert rows_that_fit(speech, 100, 40) == 40
    on_gpu = replace(speech, device="cuda")
    for rows in (1, 5, 39):
        monkeypatch.setattr(environment, "device_bytes", lambda d, n=rows: held + 3 * n * row + 1)
        assert rows_that_fit(on_gpu, 100, 40) == rows
    monkeypatch.setattr(environment, "device_bytes", lambda device: held)
    assert rows_that_fit(on_gpu, 100, 40) == 1


def test_fewer_candidates_are_decoded_together_where_a_segment_would_not_fit(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    config = ImportanceConfig(remove=1, lang="de", segments=3, batch_size=1)
    speech, task = opened(tmp_path, tiny_corpus, segments=3)
    with ExactTranslator(speech, task) as translator:
        most = {}
        for together in range(5, 0, -1):
            translator.together = together
            most[together] = translator._most_alone()
        for budget, together in ((most[5], 5), (most[5] - 1, 4), (most[2], 2), (0, 1)):
            translator.together = DECODED_TOGETHER
            translator.fit(budget)
            assert translator.together == together
            assert max(map(len, translator.groups([1, 2, 3, 4]))) == min(together, 4)
    found = []
    for name, budget in (("ample", None), ("tight", (most[2] + 1) / 1e9)):
        asked = config.model_copy(update={"memory_gb": budget})
        found.append(run_importance(asked, speech.path, tiny_corpus, tmp_path / name).path)
    for name in ("importance.jsonl", "plan.json"):
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes()
