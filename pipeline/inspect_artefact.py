"""`halve inspect`: what a directory is, what made it, and whether it is whole."""

from pathlib import Path
from typing import Any

from halve import artefact
from halve.errors import ArtefactError
from halve.families import family_for
from halve.models import read_config
from pipeline.console import Result, size


def inspect(path: Path) -> Result:
    """Describes an artefact and compares its files with their hashes; describes any model directory.

    Raises:
        ArtefactError: neither of them, or damaged.
    """
    if (path / artefact.RECORD).is_file():
        return _artefact(path)
    if (path / "config.json").is_file():
        facts = model_facts(path)
        return Result(_text(f"{path}: a model from elsewhere (no {artefact.RECORD})", facts), facts)
    artefact.read(path)
    raise ArtefactError(f"{path} is no artefact")


def _artefact(path: Path) -> Result:
    made = artefact.read(path)
    faults = artefact.verify(path)
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise ArtefactError(
            f"{path} ({made.kind}) is damaged:\n{listed}", mend="make or copy it again"
        )
    facts: dict[str, Any] = {
        "path": str(path),
        "kind": made.kind,
        "files": len(made.files),
        "stored_bytes": sum(record.size_bytes for record in made.files.values()),
        "verified": True,
        "fingerprint": made.fingerprint,
        "seed": made.seed,
        "recipe": made.recipe,
        "parents": made.parents,
        "versions": made.versions,
        **{key: value for key, value in made.extra.items() if key not in ("path", "kind")},
    }
    if (path / "config.json").is_file():
        facts |= model_facts(path)
    return Result(_text(f"{path}: {made.kind}, whole (every hash agrees)", facts), facts)


def model_facts(path: Path) -> dict[str, Any]:
    """Family and parameters of a model directory, from its config; nothing for an adapter."""
    config = read_config(path)
    if "model_type" not in config:
        return {}
    family = family_for(config)
    counts = family.count_parameters(config)
    return {
        "family": family.name,
        "decoder_layers": counts.decoder_layers,
        "logical_parameters": counts.total,
        "audio_tower_parameters": counts.audio_tower,
        "parameters_per_layer": counts.per_layer,
    }


def _text(title: str, facts: dict[str, Any]) -> str:
    shown = {
        key: _shown(key, value)
        for key, value in facts.items()
        if key not in ("path", "kind", "verified") and value not in ({}, [], None)
    }
    return "\n".join([title, *(f"  {key}: {text}" for key, text in shown.items())])


def _shown(key: str, value: Any) -> str:
    if key == "stored_bytes":
        return f"{value:,} ({size(value)})"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    return str(value)


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 and text.isalnum() else text
