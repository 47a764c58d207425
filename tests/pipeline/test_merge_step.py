"""A run that will store its student in 4 bits scores it quantised again before it is kept."""

from pathlib import Path

import pytest

from export.config import MergeConfig
from pipeline.recipe import Recipe, read_recipe
from pipeline.stages import Run, merge
from tests.pipeline.conftest import ROOT


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
    values = recipe.model_dump(exclude_unset=True)
    values["merge"]["requantized"] = False
    (step,) = merge(Run(Recipe.model_validate(values), Path("out")))
    assert step.config.requantized is False, "who says so is heard"


@pytest.mark.parametrize("name", ["qwen2-audio-7b-de", "qwen2-audio-7b-zh", "gemma-4-12b"])
def test_recipes_judge_in_4_bits_what_they_store_so(name: str) -> None:
    (path,) = ROOT.glob(f"recipes/{name}*.yaml")
    (step,) = merge(Run(read_recipe(path), Path("out")))
    assert step.config.onto == "auto" and step.config.requantized


def test_a_score_that_decides_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs onto auto, not base"):
        MergeConfig(requantized=True)
