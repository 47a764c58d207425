"""`halve inspect`: what a directory is, what made it, and whether it is whole."""

from pathlib import Path
from typing import Any

from halve import artefact
from halve.errors import ArtefactError
from halve.families import family_for
from halve.json_files import read_json
from halve.models import read_config
from halve.shards import tensor_shapes
from pipeline.console import Result, size

_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens")


def inspect(path: Path) -> Result:
    """Describes an artefact and compares its files with their hashes; describes any model directory,
    and checks its weights' headers.

    Raises:
        ArtefactError: neither of them, or damaged.
    """
    if (path / artefact.RECORD).is_file():
        return _artefact(path)
    if (path / "config.json").is_file():
        facts = model_facts(path)
        faults = tokenizer_faults(path)
        if faults:
            raise ArtefactError(
                f"{path}: {'; '.join(faults)}", mend="copy the model's own tokenizer files"
            )
        _check_weights(path)
        return Result(_text(f"{path}: a model from elsewhere (no {artefact.RECORD})", facts), facts)
    artefact.read(path)
    raise ArtefactError(f"{path} is no artefact")


def _check_weights(path: Path) -> None:
    """Checks what shows without hashes: every shard there, each as long as its header says.

    Raises:
        ArtefactError: no weights, a missing shard or a damaged one.
    """
    if not any(path.glob("*.safetensors*")) and any(path.glob("*.bin")):
        return  # weights of the older kind, which halve does not read
    tensor_shapes(path)


def _artefact(path: Path) -> Result:
    made = artefact.read(path)
    faults = [_explained(fault) for fault in artefact.verify(path)] + tokenizer_faults(path)
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


def _explained(fault: str) -> str:
    if fault.startswith(_TOKENIZER_FILES):
        return f"{fault}; this is not the tokenizer that the model was measured with"
    return fault


def tokenizer_faults(path: Path) -> list[str]:
    """What shows that a directory's tokenizer belongs to another model; empty where nothing does.

    Compares tokenizer.json with config.json: tokens that the model has no row for, and special tokens
    of the config that the tokenizer does not have or holds to be ordinary text.
    """
    if not all((path / name).is_file() for name in ("config.json", "tokenizer.json")):
        return []
    config, tokenizer = read_config(path), read_json(path / "tokenizer.json")
    try:
        ids, added = _token_ids(tokenizer)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return [
            "tokenizer.json: damaged, it holds no vocabulary and special tokens with their numbers"
        ]
    rows = config.get("text_config", config).get("vocab_size")
    faults = []
    # Some releases carry added tokens beyond their rows, as Gemma 3 1B does.
    highest = max(ids, default=0)
    if rows is not None and highest >= rows:
        faults.append(f"it has a token {highest}, the model has {rows} rows")
    for name, wanted in config.items():
        special = name.startswith(("audio", "image")) and name.endswith(
            ("_token_index", "_token_id")
        )
        if special and isinstance(wanted, int) and wanted not in added:
            faults.append(f"{name} {wanted} is no special token of it")
    return [f"tokenizer.json: a foreign tokenizer ({'; '.join(faults)})"] if faults else []


def _token_ids(tokenizer: Any) -> tuple[set[int], set[int]]:
    """The ids of a tokenizer.json's vocabulary, and of its special tokens."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    found = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = {int(token["id"]) for token in tokenizer.get("added_tokens") or []}
    return {int(one) for one in found}, added


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
