"""The committed scores are those of the committed hypotheses."""

from pathlib import Path

import pytest

from benchmarks import recheck
from benchmarks.scoring import read_result
from halve import artefact
from halve.metrics import METRICS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QUALITY = sorted(path.parent for path in RESULTS.glob("*/quality.json"))


def _is_long(result: Path) -> bool:
    files = read_result(result)
    return files.result["lang"] == "zh" and len(files.ids) > 500


def test_there_are_committed_results() -> None:
    assert len(QUALITY) >= 2


@pytest.mark.parametrize("result", QUALITY, ids=lambda path: path.name)
def test_scores_follow_from_the_hypotheses(result: Path) -> None:
    # TER over characters takes a minute a result: see below.
    metrics = [metric for metric in METRICS if metric != "ter" or not _is_long(result)]
    assert recheck.faults(result, metrics) == []
    assert artefact.verify(result) == []


@pytest.mark.slow
@pytest.mark.parametrize("result", list(filter(_is_long, QUALITY)), ids=lambda path: path.name)
def test_edit_rates_follow_from_the_hypotheses(result: Path) -> None:
    assert recheck.faults(result, ["ter"]) == []


def test_the_demo_s_intervals_follow_from_the_hypotheses() -> None:
    newest = [path for path in QUALITY if "demo-quality-de" in path.name][-1]
    assert recheck.faults(newest, ["chrf++"], intervals=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("result", QUALITY, ids=lambda path: path.name)
def test_intervals_follow_from_the_hypotheses(result: Path) -> None:
    assert recheck.faults(result, ["bleu", "chrf", "chrf++"], intervals=True) == []
