"""Model cards in the Hugging Face form: README.md with a YAML head."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from halve import artefact
from halve.families import family_for
from halve.models import read_config

CARD = "README.md"
_NOT_SHIPPED = {CARD, artefact.RECORD, artefact.TIMINGS, "partial.json"}
_CARRIED = ("license", "license_name", "license_link", "base_model", "datasets")


def stored_bytes(folder: Path) -> int:
    """The bytes of what a directory ships: all its files but its card and records."""
    return sum(
        entry.stat().st_size
        for entry in folder.rglob("*")
        if entry.is_file()
        and entry.name not in _NOT_SHIPPED
        and entry.relative_to(folder).parts[0] != "work"
    )


def read_head(folder: Path) -> dict[str, Any]:
    """The YAML head of a directory's card; empty where there is none that can be read."""
    card = folder / CARD
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf8").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def write_card(folder: Path, *, source: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Writes the card of a student or package.

    Args:
        source: the model directory that it was made from; its card's licence and base are carried over.
        facts: what the making put on record: removed, onto, select_scores, metrics, target, precision,
            languages, parity.
    """
    config = read_config(source)
    head = {key: value for key, value in read_head(source).items() if key in _CARRIED}
    head.setdefault("base_model", facts.get("base_model") or source.resolve().name)
    head["library_name"] = "onnxruntime" if facts.get("target") == "onnx" else "transformers"
    head["pipeline_tag"] = "audio-text-to-text"
    head["tags"] = ["speech-translation", "compression", family_for(config).name]
    if facts.get("languages"):
        head["language"] = ["en", *facts["languages"]]
    lines = [f"# {folder.name.strip('.').removesuffix('.partial')}", "", _summary(kind, facts), ""]
    lines += (
        _made(config, facts) + _size(config, folder, facts) + _scores(facts) + _use(kind, facts)
    )
    text = yaml.safe_dump(head, sort_keys=True, allow_unicode=True)
    (folder / CARD).write_text(f"---\n{text}---\n\n" + "\n".join(lines) + "\n", encoding="utf8")


def _summary(kind: str, facts: Mapping[str, Any]) -> str:
    if kind == "student":
        return "A speech-translation model made smaller by halve: layers pruned, tuned, merged."
    form = f"target {facts['target']}, precision {facts['precision']}"
    return f"A speech-translation model packaged by halve ({form})."


def _made(config: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    lines = ["## How it was made", ""]
    removed = facts.get("removed")
    if removed:
        lines.append(f"- Decoder layers removed (as the teacher numbers them): {removed}")
    elif removed is not None:
        lines.append("- No decoder layer was removed.")
    if facts.get("onto"):
        lines.append(f"- Adapter merged onto: {facts['onto']}")
    if facts.get("bits"):
        bits = ", ".join(f"{part} {count}" for part, count in facts["bits"].items())
        lines.append(f"- Bits of each weight (32: unchanged): {bits}")
    if facts.get("bits_per_weight"):
        shown = ", ".join(f"{part} {bits:.2f}" for part, bits in facts["bits_per_weight"].items())
        lines.append(f"- Bits a weight with scales, as stored: {shown}")
    lines.append(f"- Decoder layers: {family_for(config).num_layers(config)}")
    return [*lines, ""]


def _size(config: Mapping[str, Any], folder: Path, facts: Mapping[str, Any]) -> list[str]:
    counts = family_for(config).count_parameters(config)
    return [
        "## Size",
        "",
        f"- Stored bytes: {stored_bytes(folder):,} (all files but this card and artefact.json)",
        f"- Logical parameters: {facts.get('logical_parameters') or counts.total:,}",
        f"- Before any trimming: audio tower {counts.audio_tower:,}, decoder layers {counts.decoder:,}, "
        f"embeddings {counts.embeddings:,}, head {counts.head:,}",
        "",
    ]


def _scores(facts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, scores in (facts.get("select_scores") or {}).items():
        shown = ", ".join(
            f"{facts['metrics'][code]} ({code}) {s:.2f}" for code, s in scores.items()
        )
        lines.append(f"- {name}: {shown}")
    parity = facts.get("parity") or {}
    for code, found in (parity.get("languages") or {}).items():
        lines.append(
            f"- {code}: {found['metric']} {found['package_score']:.2f}, its student in float32 "
            f"{found['student_score']:.2f}; difference {found['difference']:+.2f} (95 % interval "
            f"{found['difference_low']:+.2f} to {found['difference_high']:+.2f}); same tokens in "
            f"{found['equal']} of {found['segments']} segments. Signature: `{found['signature']}`"
        )
    if parity and not parity.get("passed"):
        reason = (
            "kept by force though it was not faithful enough" if parity.get("forced") else "none"
        )
        lines.append(f"- Parity with the student: {parity.get('reason') or reason}")
    head = [
        "## Scores on `select`",
        "",
        "Layers and settings were chosen on these segments: use `test`",
    ]
    return [*head, "segments for comparison with other models.", "", *lines, ""] if lines else []


def _use(kind: str, facts: Mapping[str, Any]) -> list[str]:
    lang = next(iter(facts.get("languages") or ["de"]))
    lines = ["## Use", "", "```", f"halve translate --model . --lang {lang} speech.wav", "```"]
    if kind == "student" or facts.get("target") == "checkpoint":
        lines += ["", "It also loads in stock transformers with `from_pretrained`."]
    return lines
