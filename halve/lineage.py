"""What was done to a model before: a student may be pruned, tuned and pruned again, and its statement names all of it."""

from pathlib import Path
from typing import Any

from halve import artefact

TUNED, RANKED = "tuned_before", "ranked_before"
"""In a record: how earlier stages trained the weights, and by what they ranked layers; the first stage first."""


def earlier_training(model: Path) -> dict[str, Any]:
    """For the record of what is trained or pruned from a model: how its weights came about."""
    extra = _extra(model)
    # Scores are those of weights that are no more.
    last = {key: value for key, value in extra.get("tuned", {}).items() if key != "scores"}
    found = [*extra.get(TUNED, ()), *([last] if last else [])]
    return {TUNED: found} if found else {}


def earlier_ranking(model: Path) -> dict[str, Any]:
    """For the record of what is pruned from a model: by what its missing layers were ranked."""
    extra = _extra(model)
    last = [extra["ranked_by"]] if extra.get("removed") and extra.get("ranked_by") else []
    found = [*extra.get(RANKED, ()), *last]
    return {RANKED: found} if found else {}


def _extra(model: Path) -> dict[str, Any]:
    return artefact.read(model).extra if (model / artefact.RECORD).is_file() else {}
