"""The table of rounds: medians, and what is missing."""

from pathlib import Path

import pytest

from benchmarks.rivals import collect, main
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
