"""The committed scores are those of the committed hypotheses."""

from pathlib import Path

import pytest

from benchmarks import conditions
from benchmarks.scoring import read_result, recompute_faults
from halve import artefact

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QUALITY = sorted(path.parent for path in RESULTS.glob("*/quality.json"))


def test_there_are_committed_results() -> None:
    assert len(QUALITY) >= 2


@pytest.mark.parametrize("result", QUALITY, ids=lambda path: path.name)
def test_scores_follow_from_the_hypotheses(result: Path) -> None:
    assert recompute_faults(result) == []
    assert conditions.faults(read_result(result)) == []
    assert artefact.verify(result) == []
