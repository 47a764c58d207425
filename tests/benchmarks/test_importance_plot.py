"""The plot and the table of a search show every candidate, and say what an early stop means."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gather import Source
from benchmarks.plots import importance_plot
from benchmarks.tables import removed_table
from halve import artefact

ROWS: dict[str, list[dict[str, Any]]] = {
    "exact": [{"round": r, "layer": n, "score": 20.0 + n - r} for r in (1, 2) for n in (1, 2, 3)],
    "bounded": [
        {"round": 1, "layer": 1, "score": 21.0},
        {"round": 1, "layer": 2, "score": 19.5, "settled": "bound", "segments": 4},
    ],
    "racing": [
        {"round": 1, "layer": 1, "score": 21.0},
        {"round": 1, "layer": 2, "score": 9.5, "settled": "race", "confidence": 0.9975},
    ],
    "loss": [{"round": 1, "layer": n, "score": 2.1 + n / 100, "better": "lower"} for n in (1, 2)],
}


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("exact", "higher goes first"),
        ("bounded", "its score is at most this"),
        ("racing", "score on the segments seen"),
        ("loss", "lower goes first"),
    ],
)
def test_every_candidate_is_drawn(method: str, says: str) -> None:
    rows = [{"metric": "chrf++", **row} for row in ROWS[method]]
    removed = [3, 2] if method == "exact" else [1]
    drawn = importance_plot(rows, removed, None if method == "loss" else 25.0)
    # Without outlines for letters, matplotlib leaves each text in a comment beside its shape.
    assert says in drawn
    assert ("every layer kept" in drawn) == (method != "loss")
    settled = sum("settled" in row for row in rows)
    whole = importance_plot([row for row in rows if "settled" not in row], removed)
    assert drawn.count("<use ") - whole.count("<use ") >= settled


@pytest.mark.parametrize("method", ["exact", "bounded", "racing", "loss"])
def test_the_table_says_what_a_figure_stands_on(method: str, tmp_path: Path) -> None:
    with artefact.writing(tmp_path / "out", "importance", {"segments": 60}, 0, {}) as draft:
        draft.extra.update(segments_in_split=120, least_confidence=0.9975, joint_confidence=0.9925)
    rows = [{"metric": "chrf++", "signature": "sig", **row} for row in ROWS[method]]
    plan: dict[str, Any] = {
        "removed": [3, 2] if method == "exact" else [1],
        "num_layers": 6,
        "method": method,
        "baseline": None if method == "loss" else 25.0,
        "max_new_tokens": dict.fromkeys(map(str, range(60)), 9),
    }
    table = removed_table(Source("search", "", artefact.read(tmp_path / "out")), rows, plan)
    assert "60 of 120 select segments" in table.title
    assert [row[1] for row in table.rows] == [str(layer) for layer in plan["removed"]]
    early = sum("settled" in row for row in rows)
    assert table.rows[0][-1] == str(early)
    assert ("99.75 %" in table.note and "99.2 %" in table.note) == (method == "racing")
    assert ("lowest goes first" in table.note) == (method == "loss")
    assert table.rows[0][2] == {"loss": "2.11", "exact": "22.00"}.get(method, "21.00")


def test_layers_that_go_at_once_are_all_listed(tmp_path: Path) -> None:
    with artefact.writing(tmp_path / "out", "importance", {}, 0, {}) as draft:
        draft.extra.update(segments_in_split=4)
    row = {"round": 1, "metric": "influence", "signature": "sig", "better": "lower"}
    rows = [{**row, "layer": layer, "score": layer / 10} for layer in (1, 2, 3, 4)]
    plan: dict[str, Any] = {"removed": [1, 2, 3], "num_layers": 6, "max_new_tokens": {}}
    table = removed_table(Source("search", "", artefact.read(tmp_path / "out")), rows, plan)
    assert [row[:4] for row in table.rows] == [
        ["1", "1", "0.1", "4"],
        ["2", "2", "0.2", "4"],
        ["3", "3", "0.3", "4"],
    ]
