"""A run that will store its student in 4 bits scores it quantised again before it is kept."""

from pathlib import Path

import pytest

from pipeline.recipe import Recipe
from pipeline.stages import Run, merge


@pytest.mark.parametrize(
    ("onto", "precision", "scored"),
    [("auto", "nf4", True), ("auto", "bf16", False), ("base", "nf4", False)],
)
def test_students_in_4_bits_are_scored_so(onto: str, precision: str, scored: bool) -> None:
    recipe = Recipe.model_validate(
        {
            "lang": ["de"],
            "teacher": "teacher",
            "corpus": {"source": "corpus", "format": "halve"},
            "tune": {"langs": ["de"]},
            "merge": {"onto": onto},
            "packages": [{"target": "checkpoint", "precision": precision}],
        }
    )
    (step,) = merge(Run(recipe, Path("out")))
    assert step.config.requantized is scored
