"""The model families: one file each, one row here."""

import copy
from collections.abc import Mapping
from typing import Any

from halve.errors import FamilyError
from halve.families.base import Counts, Family, GgufLayout, Source, SourceText, resolve
from halve.families.gemma3 import Gemma3
from halve.families.gemma4 import Gemma4
from halve.families.gemma4_unified import Gemma4Unified
from halve.families.qwen2_5_omni import Qwen25Omni
from halve.families.qwen2_audio import Qwen2Audio
from halve.families.text import Text
from halve.families.voxtral import Voxtral
from halve.families.whisper import Whisper

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Qwen2Audio(),
        Text(),
        Whisper(),
        Gemma3(),
        Gemma4(),
        Gemma4Unified(),
        Voxtral(),
        Qwen25Omni(),
    )
}
DEFAULT_FAMILY = next(iter(FAMILIES))
"""Whose limits hold where no model is named yet."""


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a model's config.json.

    Raises:
        FamilyError: halve has no file for this architecture.
    """
    model_type = str(config.get("model_type"))
    for family in FAMILIES.values():
        if model_type in family.model_types:
            if family.reads == "audio" and config.get("audio_config", {}) is None:
                raise FamilyError(
                    f"This {model_type} model hears nothing: its audio_config is null",
                    expected="a release with an audio encoder (of Gemma 4: E2B, E4B or 12B)",
                )
            return family
        if model_type in family.refused:
            raise FamilyError(
                f"A {model_type} model as a whole is not taken",
                expected=f"model type {', '.join(family.model_types)}",
                mend=family.refused[model_type],
            )
    raise FamilyError(
        f"Unknown model type {model_type!r}",
        expected=f"one of the families {', '.join(FAMILIES)}",
        mend="add a file to halve/families/ and a row to its table: docs/add-a-family.md shows how",
    )


def released_config(model: str) -> dict[str, Any] | None:
    """The shapes of a model on the hub, by its id; None where no family knows it."""
    for family in FAMILIES.values():
        if model in family.released:
            return copy.deepcopy(dict(family.released[model]))
    return None


__all__ = [
    "DEFAULT_FAMILY",
    "FAMILIES",
    "Counts",
    "Family",
    "GgufLayout",
    "Source",
    "SourceText",
    "family_for",
    "released_config",
    "resolve",
]
