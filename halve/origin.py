"""Where a model comes from and under which licence: handed on from teacher to student to package."""

from pathlib import Path
from typing import Any

import yaml

from halve import artefact

CARD = "README.md"
CARRIED = ("base_model", "license", "license_name", "license_link", "language", "datasets")


def read_head(folder: Path) -> dict[str, Any]:
    """The YAML head of a directory's model card; empty where there is none that can be read."""
    card = folder / CARD
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def origin(model: Path) -> dict[str, Any]:
    """What the cards of everything made of `model` must say of it: the keys of `CARRIED`.

    What an artefact's record holds, and of its card what the record does not say; of any other model, what its
    card says. A model of the hub, and one whose card names no base, is the base itself: an instruct release's card
    names what that was made from.
    """
    found = {key: value for key, value in read_head(model).items() if key in CARRIED and value}
    if (model / artefact.RECORD).is_file():
        found |= artefact.read(model).extra.get("origin") or {}
    elif _is_of_hub(model):
        found.pop("base_model", None)
    return {"base_model": _name(model), **found}


def _is_of_hub(model: Path) -> bool:
    place = model.absolute()
    return place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--")


def _name(model: Path) -> str:
    """models--OWNER--NAME/snapshots/REVISION is OWNER/NAME; any other directory goes by its name."""
    place = model.absolute()
    if _is_of_hub(model):
        return place.parent.parent.name.removeprefix("models--").replace("--", "/")
    return place.resolve().name
