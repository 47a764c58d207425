"""The table of rounds: medians, and what is missing."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.peer_tables import ratios_table
from benchmarks.rivals import collect, main
from benchmarks.speed import compare
from halve.errors import ArtefactError
from halve.json_files import write_json


def entry(ms: float, **named: object) -> dict[str, object]:
    return {"threads": 1, "clips": {"short": {"tpot_ms": {"p50": ms}}}, **named}


def test_medians_over_rounds_fastest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtefactError, match="no rounds"):
        collect(tmp_path)
    for number, (ours, theirs) in enumerate([(0.5, 0.6), (0.9, 0.61), (0.52, 0.4)], 1):
        folder = tmp_path / f"rivals-teacher-{number}"
        folder.mkdir()
        result = {
            "models": [entry(ours, path="runs/latency/teacher-int4")],
            "other_threads": [],
            "peers": [entry(theirs, peer="genai-int4")],
        }
        write_json(folder / "latency.json", result)
    assert main([str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "threads" in line]
    assert lines == [
        "| teacher-int4, 1 threads | 0.520 | 0.500, 0.900, 0.520 |",
        "| genai-int4, 1 threads | 0.600 | 0.600, 0.610, 0.400 |",
    ]
    assert (tmp_path / "rivals.json").is_file()


def test_ratios_say_what_pruning_adds_and_which_peer_is_next() -> None:
    def timed(tpot_ms: float, rtf: float, **facts: object) -> dict[str, Any]:
        clips = {"short": {"tpot_ms": {"p50": tpot_ms}, "rtf": {"p50": rtf}}}
        return {"clips": clips, "weight_bytes": 1, "device": "cpu", "precision": "int4", **facts}

    models = [
        timed(2.0, 0.2, path="whole", layers=12),
        timed(1.0, 0.16, path="nine", layers=9),
    ]
    peers = [
        timed(8.0, 0.8, peer="transformers-fp32", threads=1, compiled=False),
        timed(6.0, 0.7, peer="transformers-fp32", threads=2, compiled=False),
        timed(2.2, 0.0, peer="genai-int4", threads=2, compiled=False),
    ]
    del peers[2]["clips"]["short"]["rtf"]
    for model in models:
        compare(model, [], peers)
    table = ratios_table({"models": models, "peers": peers, "threads": 1}, "short")
    assert table is not None
    assert table.rows == [
        ["whole", "3.0, 3.5", "1.10 (genai-int4, 2 threads)", ""],
        ["nine", "6.0, 4.4", "2.20 (genai-int4, 2 threads)", "2.00, 1.25"],
    ]
