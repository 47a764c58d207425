"""The importance stage: decisions, refusals, resuming, and the methods that stop early or do not translate."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import criteria, encoded, exact, importance, racing
from compress.config import ImportanceConfig
from compress.exact import ExactTranslator
from compress.importance import run_importance
from compress.search import Candidate, Ledger, Ranking, Search, best, every_candidate, greedy
from halve import artefact, environment
from halve.errors import ArtefactError, CorpusError, InputError
from halve.json_files import read_json, read_jsonl
from halve.languages import token_limit
from halve.progress import Progress
from tests import tiny
from tests.compress.damage import spoilt
from tests.compress.search_models import Scripted, scripted_task

pytestmark = pytest.mark.usefixtures("two_threads")

ROOT = Path(__file__).parents[2]


def ranked(method: str, model: Path, corpus: Path, out: Path, **options: Any) -> dict[str, Any]:
    """The plan of one run."""
    config = ImportanceConfig(**{"remove": 1, "lang": "de", "method": method, **options})
    result = run_importance(config, model, corpus, out)
    assert artefact.verify(result.path) == []
    plan: dict[str, Any] = read_json(result.path / "plan.json")
    assert sorted(plan["removed"] + plan["kept"]) == list(range(6))
    assert 0 in plan["kept"] and 5 in plan["kept"]
    return plan


def test_plan_and_scores(tiny_model: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    plan = ranked("exact", tiny_model, tiny_corpus, tmp_path / "out", segments=3)
    records = read_jsonl(tmp_path / "out" / "importance.jsonl")
    assert [(record["round"], record["layer"]) for record in records] == [
        (1, layer) for layer in (1, 2, 3, 4)
    ]
    top = max(records, key=lambda record: (record["score"], -record["layer"]))
    assert plan["removed"] == [top["layer"]]
    assert all("nw:2" in record["signature"] for record in records)
    assert (plan["family"], plan["num_layers"], plan["lang"]) == ("qwen2_audio", 6, "de")
    manifest = read_jsonl(tiny_corpus / "manifest.jsonl")
    durations = {line["id"]: line["duration_s"] for line in manifest}
    assert len(plan["max_new_tokens"]) == 3
    assert all(
        limit == token_limit(durations[name]) for name, limit in plan["max_new_tokens"].items()
    )
    assert not (tmp_path / "out" / "work").exists()
    extra = artefact.read(tmp_path / "out").extra
    assert (extra["segments"], extra["segments_in_split"]) == (3, 6)


def test_a_shortlist_tries_what_a_cheap_criterion_would_remove(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    cheap = ranked("block-influence", tiny_model, tiny_corpus, tmp_path / "a", remove=4, segments=3)
    plan = ranked(
        "exact", tiny_model, tiny_corpus, tmp_path / "b", remove=2, segments=3, shortlist=2
    )
    rows = read_jsonl(tmp_path / "b" / "importance.jsonl")
    tried = [{row["layer"] for row in rows if row["round"] == number} for number in (1, 2)]
    assert tried[0] == set(cheap["removed"][:2])
    assert tried[1] == set([layer for layer in cheap["removed"] if layer != plan["removed"][0]][:2])
    assert plan["shortlist"] == {"size": 2, "by": "block-influence"}


def test_memory_that_no_segment_fits_in_is_refused(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        InputError,
        match=r"Segment s\d+ alone takes .* GB beside .* GB of encoded segments, and 0.000 GB are allowed",
    ):
        ranked("exact", tiny_model, tiny_corpus, tmp_path / "out", memory_gb=1e-6)


def test_segments_that_main_memory_cannot_hold_are_refused_before_all_are_encoded(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, whole = [], encoded.take_in

    def take_in(*given: Any) -> Any:
        heard.append(given)
        return whole(*given)

    monkeypatch.setattr(encoded, "take_in", take_in)
    monkeypatch.setattr(environment, "memory_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"\d+ encoded segments take about .* fewer --segments"):
        ranked("exact", tiny_model, tiny_corpus, tmp_path / "out")
    assert len(heard) == 2


@pytest.mark.parametrize("method", ["block-influence", "angular", "loss", "random", "middle"])
def test_cheap_methods_make_plans(
    method: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    plan = ranked(method, tiny_model, tiny_corpus, tmp_path / "out", remove=2, segments=3)
    assert len(plan["removed"]) == 2
    again = ranked(method, tiny_model, tiny_corpus, tmp_path / "again", remove=2, segments=3)
    assert again == plan


def test_a_choice_without_looking_says_what_it_does_nothing_with(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    warned: list[str] = []

    class Told(Progress):
        def warn(self, text: str) -> None:
            warned.append(text)

    config = ImportanceConfig(remove=2, lang="de", method="middle", workers=2, confidence=0.9)
    run_importance(config, tiny_model, tiny_corpus, tmp_path / "out", Told())
    assert warned == ["--method middle does nothing with --workers, --confidence"]


def test_loss_keeps_to_the_memory_and_forgets_the_layers_behind(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, packed = [], []
    advance, pack = ExactTranslator.advance, ExactTranslator.pack

    def noted(self: Any, one: Any, layer: int) -> None:
        advance(self, one, layer)
        held.append(len(one.attention.keys))

    def counted(self: Any, rows: Any, drafts: Any) -> Any:
        packed.append(len(rows))
        return pack(self, rows, drafts)

    monkeypatch.setattr(ExactTranslator, "advance", noted)
    monkeypatch.setattr(ExactTranslator, "pack", counted)
    scores = []
    for name, most in (("whole", 128), ("parts", 1)):
        ranked("loss", tiny_model, tiny_corpus, tmp_path / name, segments=3, batch_size=most)
        lines = read_jsonl(tmp_path / name / "importance.jsonl")
        scores.append([line["score"] for line in lines])
    assert packed == [3, 1, 1, 1]
    assert max(held) == 1
    assert scores[0] == pytest.approx(scores[1])
    for options in (
        {"method": "loss"},
        {"method": "exact", "shortlist": 2, "shortlist_by": "loss"},
    ):
        with pytest.raises(InputError, match=r"Segment s\d+ alone takes"):
            ranked(
                model=tiny_model,
                corpus=tiny_corpus,
                out=tmp_path / "out",
                memory_gb=1e-6,
                **options,
            )


def test_references_end_as_the_model_says_it_whatever_else_ends_generation(
    tiny_corpus: Path, tmp_path: Path
) -> None:
    losses = []
    for name in ("alone", "after another"):
        model = tiny.make_model(tmp_path / name)
        settings = read_json(model / "generation_config.json")
        if name != "alone":
            settings["eos_token_id"] = [0, settings["eos_token_id"]]
        (model / "generation_config.json").write_text(json.dumps(settings), encoding="utf8")
        ranked("loss", model, tiny_corpus, tmp_path / f"{name}-plan", segments=3)
        lines = read_jsonl(tmp_path / f"{name}-plan" / "importance.jsonl")
        losses.append([line["score"] for line in lines])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"remove": 5}, InputError, "at most 4"),
        ({"lang": "xx"}, InputError, "Unknown language"),
        ({"lang": "fr"}, CorpusError, "no select segment"),
        ({"split": "test"}, InputError, "test split"),
        ({"metric": "ter"}, InputError, "chrf"),
        ({"metric": "nonsense"}, InputError, "chrf"),
    ],
)
def test_refusals_leave_nothing(
    options: dict[str, Any],
    error: type[Exception],
    says: str,
    tiny_model: Path,
    tiny_corpus: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        ranked("exact", tiny_model, tiny_corpus, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from compress.config import ImportanceConfig
from compress.importance import run_importance
from compress import exact
from compress.search import Ledger
exact.DECODED_TOGETHER = 2
add = Ledger.add
def slowly(*args):
    add(*args)
    time.sleep(0.3)  # leaves the other process time to aim
Ledger.add = slowly
model, corpus, out = map(Path, sys.argv[1:])
run_importance(ImportanceConfig(remove=2, lang="de", segments=4, batch_size=2), model, corpus, out)
"""


def test_a_killed_search_goes_on_and_ends_the_same(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / ".killed.partial" / "work" / "ledger.jsonl"
    places = (tiny_model, tiny_corpus, tmp_path / "killed")
    command = [sys.executable, "-c", KILLED, *map(str, places)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        # The chunks, two of the whole model, two groups of the first chunk's candidates.
        while process.poll() is None and _lines(ledger) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = [found for record in read_jsonl(ledger) for found in record.get("found", [])]
    with open(ledger, "ab") as file:
        file.write(b'{"round": 1, "la')  # as a kill in mid-write leaves it
    calls: list[int | None] = []
    run = ExactTranslator.run

    def counted(self: Any, kept: Any, drafts: Any, candidates: Any, rows: Any) -> Any:
        for found in run(self, kept, drafts, candidates, rows):
            calls.extend(found)
            yield found

    monkeypatch.setattr(exact, "DECODED_TOGETHER", 2)
    monkeypatch.setattr(ExactTranslator, "run", counted)
    config = ImportanceConfig(remove=2, lang="de", segments=4, batch_size=2)
    run_importance(config, tiny_model, tiny_corpus, tmp_path / "killed")
    resumed = len(calls)
    run_importance(config, tiny_model, tiny_corpus, tmp_path / "whole")
    pieces = 2 * (1 + 4 + 3)
    assert resumed == pieces - len(done) and len(calls) - resumed == pieces
    for name in ("importance.jsonl", "plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_ties_go_to_the_lower_layer() -> None:
    tied = [Candidate(1, 4, 7.0), Candidate(1, 2, 7.0), Candidate(1, 3, 6.5)]
    assert best(tied).layer == 2
    settled = Candidate(1, 1, 9.0, {"settled": "bound"})
    assert best([*tied, settled]).layer == 2


REFERENCES = [
    f"der {word} Satz steht auf Seite {index}"
    for index, word in enumerate("abcdefghijklmnopqrstuvwx")
]


def _spoilt(share: float) -> list[str]:
    """References, so many of them replaced by something else, spread evenly."""
    return [
        "xyz qqq" if math.floor((index + 1) * share) > math.floor(index * share) else text
        for index, text in enumerate(REFERENCES)
    ]


def _scripted(tmp_path: Path, name: str, play: Any) -> tuple[list[Candidate], Scripted]:
    script: dict[int | None, list[str]] = {
        None: REFERENCES,
        **{layer: _spoilt(share) for layer, share in {1: 0.9, 2: 0.2, 3: 0.25, 4: 1.0}.items()},
    }
    translator, task = Scripted(script), scripted_task(REFERENCES)
    method = "racing" if name == "racing" else "bounded"
    chunks = racing.stratify(lambda chunks: True, [len(text) for text in REFERENCES], 99, method)
    search = Search(translator, task, Ledger(tmp_path / name), chunks, lambda n=1, note="": None)
    return play(search, 1, range(6), [[] for _ in REFERENCES], [1, 2, 3, 4]), translator


def test_bounded_decides_as_exact_and_asks_less(tmp_path: Path) -> None:
    full, all_asked = _scripted(tmp_path, "full", every_candidate)
    found, translator = _scripted(tmp_path, "bounded", racing.bounded)
    assert best(found) == best(full)
    assert len(translator.asked) < len(all_asked.asked)
    for candidate, whole in zip(found, full, strict=True):
        assert candidate.layer == whole.layer
        assert candidate.score >= whole.score - 1e-9, "a bound lies above the score"
    assert {candidate.layer for candidate in found if candidate.facts} >= {1, 4}


def test_racing_stops_the_hopeless_and_says_how_sure(tmp_path: Path) -> None:
    full, all_asked = _scripted(tmp_path, "full", every_candidate)
    found, translator = _scripted(
        tmp_path, "racing", lambda *round_: racing.racing(*round_, confidence=0.99, seed=0)
    )
    assert best(found) == best(full)
    assert len(translator.asked) < len(all_asked.asked)
    stopped = [candidate for candidate in found if candidate.facts.get("settled") == "race"]
    assert stopped and all(0.99 < candidate.facts["confidence"] < 1 for candidate in stopped)
    ranking = Ranking((2,), tuple(found), "chrf++", "")
    facts = importance._stopped(ranking)
    doubts = [1 - candidate.facts["confidence"] for candidate in stopped]
    assert facts["stopped_early"] == len(stopped)
    assert facts["least_confidence"] == pytest.approx(1 - max(doubts), abs=1e-6)
    assert facts["joint_confidence"] == pytest.approx(1 - sum(doubts), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(4, 30))
def test_bounded_always_picks_what_exact_picks(shares: list[float], most: int) -> None:
    script: dict[int | None, list[str]] = {
        layer: _spoilt(share) for layer, share in enumerate(shares, start=1)
    }
    winners = []
    for play in (every_candidate, racing.bounded):
        with _folder() as folder:
            lengths = [len(text) for text in REFERENCES]
            chunks = racing.stratify(lambda chunks: True, lengths, most, "bounded")
            search = Search(
                Scripted(script),
                scripted_task(REFERENCES),
                Ledger(folder / "ledger"),
                chunks,
                lambda n=1, note="": None,
            )
            winners.append(best(play(search, 1, range(6), [[] for _ in REFERENCES], [1, 2, 3, 4])))
    assert winners[0] == winners[1]


def _folder() -> Any:
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def opened() -> Any:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)

    return opened()


def test_greedy_drops_the_best_in_order(tmp_path: Path) -> None:
    script: dict[int | None, list[str]] = {
        None: REFERENCES,
        **{layer: _spoilt(share) for layer, share in {1: 0.3, 2: 0.1, 3: 0.2}.items()},
    }
    search = Search(
        Scripted(script),
        scripted_task(REFERENCES),
        Ledger(tmp_path / "ledger"),
        [list(range(24))],
        lambda n=1, note="": None,
    )
    ranking = greedy(search, 5, 3)
    assert ranking.removed == (2, 3, 1)
    assert ranking.baseline == pytest.approx(100.0)
    assert [(c.round, c.layer) for c in ranking.candidates] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1),
    ]  # fmt: skip


def test_distances() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert criteria.block_influence(east, 3 * east).item() == pytest.approx(0.0, abs=1e-6)
    assert criteria.block_influence(east, north).item() == pytest.approx(1.0)
    assert criteria.angular_distance(east, north).item() == pytest.approx(0.5)
    assert criteria.angular_distance(east, -east).item() == pytest.approx(1.0)


def test_blind_choices() -> None:
    assert criteria.blind("middle", 12, 4, 0).removed == (4, 5, 6, 7)
    assert criteria.blind("middle", 6, 4, 0).removed == (1, 2, 3, 4)
    drawn = criteria.blind("random", 12, 5, 3).removed
    assert drawn == criteria.blind("random", 12, 5, 3).removed
    assert len(set(drawn)) == 5 and not {0, 11} & set(drawn)


def test_no_environment_is_needed_to_read_the_config() -> None:
    code = "import sys, compress.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    fields = json.loads(json.dumps(ImportanceConfig.model_json_schema()))["properties"]
    assert all(field.get("description") for field in fields.values())


@pytest.mark.parametrize("method", ["exact", "loss"])
def test_a_model_of_no_numbers_is_not_ranked(
    method: str, tiny_model: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    model = spoilt(tiny_model, tmp_path / "model", float("nan"))
    with pytest.raises(
        ArtefactError, match=r"layers\.3\.mlp\.up_proj\.weight holds values that are no"
    ):
        ranked(method, model, tiny_corpus, tmp_path / "found", remove=1, segments=2)
    assert not (tmp_path / "found").exists()


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="block-influence of layer 2 is nan"):
        criteria._least_influence(np.array([0.1, 0.2, np.nan, 0.1]), 1, [1, 2], 4)
    state = torch.ones(3, 4)
    with pytest.raises(InputError, match="angular of layer 1 is nan"):
        criteria._nearest_block([state, state * torch.nan, state, state], 1, [1, 2])
    with pytest.raises(InputError, match="loss of layer 1 is inf"):
        criteria.check_finite("loss", {0: 1.0, 1: math.inf})
