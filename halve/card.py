"""Model cards in the Hugging Face form: README.md with a YAML head."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from halve import artefact
from halve.families import family_for
from halve.families.text import SOURCE
from halve.languages import ENGLISH, language
from halve.models import load_processor, read_config
from halve.origin import CARD, origin

_NOT_SHIPPED = {CARD, artefact.RECORD, artefact.TIMINGS, "partial.json"}
_PIPELINES = {"audio": "audio-text-to-text", "text": "translation"}
_WORDS = {"audio": ("speech", "speech.wav"), "text": ("text", "lines.txt")}
"""By what a model reads: what is translated, and an example of it."""
_MADE = {
    "pruned": "whose decoder lost layers in halve. It is not tuned yet.",
    "teacher": "fine-tuned by halve.",
    "tuned": "tuned in full by halve.",
    "student": "made smaller by halve: layers pruned, tuned, merged.",
}
_LIBRARIES = {"onnx": "onnxruntime", "gguf": "llama.cpp"}


def stored_bytes(folder: Path) -> int:
    """The bytes of what a directory ships: all its files but its card and records."""
    return sum(
        entry.stat().st_size
        for entry in folder.rglob("*")
        if entry.is_file()
        and entry.name not in _NOT_SHIPPED
        and entry.relative_to(folder).parts[0] != "work"
    )


def write_card(folder: Path, *, source: Path, kind: str, facts: Mapping[str, Any]) -> None:
    """Writes the card of a model that a stage made.

    Args:
        kind: pruned, teacher, tuned (in full), student or package.
        source: the model directory that it was made from; where that came from and how it was made is
            carried over.
        facts: what the making put on record: removed, onto, merge, target, precision, languages, parity.
    """
    config = read_config(folder if (folder / "config.json").is_file() else source)
    reads = family_for(config).reads
    facts = {**_recorded(source, kind), **facts, "reads": reads}
    head = origin(source)
    name = _name(folder, kind, head["base_model"])
    head["library_name"] = _LIBRARIES.get(facts.get("target", ""), "transformers")
    head["pipeline_tag"] = _PIPELINES[reads]
    head["tags"] = [f"{_WORDS[reads][0]}-translation", "compression", family_for(config).name]
    languages = facts.get("languages") or facts.get("langs")
    if languages:
        head["language"] = list(dict.fromkeys(["en", *languages]))
    measured = _measured(facts)
    if measured:
        head["metrics"] = sorted({metric["type"] for metric in measured})
        head["model-index"] = [{"name": name, "results": _results(measured, reads)}]
    lines = [f"# {name}", "", _summary(kind, facts), ""]
    lines += (
        _made(config, facts, head)
        + _size(config, folder, facts)
        + _scores(facts)
        + _use(kind, facts, source)
    )
    text = yaml.safe_dump(head, sort_keys=True, allow_unicode=True)
    (folder / CARD).write_text(f"---\n{text}---\n\n" + "\n".join(lines) + "\n", encoding="utf8")


def _name(folder: Path, kind: str, base: Any) -> str:
    """What the card calls the model: what is shipped by its folder, what is made on the way by its base.

    The same inputs must give the same bytes wherever they are written.
    """
    if kind in ("student", "package"):
        return folder.name.strip(".").removesuffix(".partial")
    first = base[0] if isinstance(base, list) and base else base
    return f"{str(first).rpartition('/')[2]}-{kind}"


def _recorded(source: Path, kind: str) -> dict[str, Any]:
    """What the source's record says of how it was made; of its scores only where these are the same weights, packaged."""
    if not (source / artefact.RECORD).is_file():
        return {}
    extra = artefact.read(source).extra
    keys = ("removed", "onto", "mean_of", "merge", "tuned") if kind == "package" else ("removed",)
    return {key: extra[key] for key in keys if key in extra}


def _measured(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores of these very files: a package's parity check, else the merge that was kept."""
    languages = (facts.get("parity") or {}).get("languages") or {}
    if facts.get("target"):
        found = [
            (code, each["metric"], each["package_score"], each["signature"])
            for code, each in languages.items()
        ]
    else:
        rows = (facts.get("merge") or {}).get("rows", ())
        kept = (r for r in rows if r["form"] == "merged" and r["onto"] == facts["onto"])
        found = [
            (code, each["metric"], each["score"], each["signature"])
            for row in kept
            for code, each in row["scores"].items()
        ]
    return [
        {
            "type": metric,
            "name": f"{metric} into {code}",
            "value": round(value, 2),
            "args": signature,
        }
        for code, metric, value, signature in found
    ]


def _results(measured: list[dict[str, Any]], reads: str) -> list[dict[str, Any]]:
    return [
        {
            "task": {
                "type": "translation",
                "name": f"{_WORDS[reads][0].capitalize()} translation",
            },
            "dataset": {"name": "the corpus it was tuned on, split select", "type": reads},
            "metrics": measured,
        }
    ]


def _summary(kind: str, facts: Mapping[str, Any]) -> str:
    word, _ = _WORDS[facts["reads"]]
    if kind in _MADE:
        return f"A {word}-translation model {_MADE[kind]}"
    form = f"target {facts['target']}, precision {facts['precision']}"
    return f"A {word}-translation model packaged by halve ({form})."


def _made(
    config: Mapping[str, Any], facts: Mapping[str, Any], head: Mapping[str, Any]
) -> list[str]:
    lines = ["## How it was made", "", f"- Base model: {head['base_model']}"]
    lines.append(f"- Licence: {head.get('license') or 'the base model does not say'}")
    removed = facts.get("removed")
    if removed:
        lines.append(f"- Decoder layers removed (as the teacher numbers them): {removed}")
    elif removed is not None:
        lines.append("- No decoder layer was removed.")
    if facts.get("onto"):
        what = "models" if str(facts["onto"]).startswith("none") else "adapters"
        mean = f", the mean of {facts['mean_of']} {what}" if facts.get("mean_of") else ""
        lines.append(f"- Adapter merged onto: {facts['onto']}{mean}")
    lines += _bits(facts.get("bits") or {})
    if facts.get("bits_per_weight"):
        shown = ", ".join(f"{part} {bits:.2f}" for part, bits in facts["bits_per_weight"].items())
        lines.append(f"- Bits a weight with scales, as stored: {shown}")
    lines.append(f"- Decoder layers: {family_for(config).num_layers(config)}")
    if facts.get("kept_tokens"):
        whole = family_for(config).text_config(config)["vocab_size"]
        lines.append(
            f"- Vocabulary trimmed to {facts['kept_tokens']:,} of {whole:,} tokens: no other can be said. Scores on texts that "
            "it was trimmed by flatter it."
        )
    return [*lines, ""]


def _bits(bits: Mapping[str, Any]) -> list[str]:
    """What a package's weights are stored in."""
    parts = {
        name: bits[name] for name in ("decoder", "head", "embeddings", "encoder") if name in bits
    }
    if not parts or bits.get("half"):  # all in 16 bits, as the line of stored bits says
        return []
    listed = ", ".join(f"{name} {count}" for name, count in parts.items())
    blocks = f", a scale for every {bits['block_size']} weights" if min(parts.values()) < 16 else ""
    lines = [f"- Bits of each weight (32: unchanged): {listed}{blocks}"]
    if bits.get("cache") == 8:
        lines.append("- Keys and values are kept in 8 bits.")
    return lines


def _size(config: Mapping[str, Any], folder: Path, facts: Mapping[str, Any]) -> list[str]:
    counts = family_for(config).count_parameters(config)
    return [
        "## Size",
        "",
        f"- Stored bytes: {stored_bytes(folder):,} (all files but this card, artefact.json and a statement of size)",
        f"- Logical parameters: {facts.get('logical_parameters') or counts.total:,}",
        f"- Before any trimming: audio tower {counts.audio_tower:,}, decoder layers {counts.decoder:,}, "
        f"embeddings {counts.embeddings:,}, head {counts.head:,}",
        "",
    ]


def _scores(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {row['form']} ({row['precision']}, onto {row['onto']}): "
        + ", ".join(
            f"{each['metric']} ({code}) {each['score']:.2f} (`{each['signature']}`)"
            for code, each in row["scores"].items()
        )
        for row in (facts.get("merge") or {}).get("rows", ())
    ]
    if not lines and not facts.get("target"):
        lines = [
            f"- while it was tuned, with repetition loops cut short: {each['metric']} ({code}) {each['score']:.2f} (`{each['signature']}`)"
            for code, each in ((facts.get("tuned") or {}).get("scores") or {}).items()
        ]
    parity = facts.get("parity") or {}
    its = str(parity.get("reference", "the student in float32")).replace("the ", "its ", 1)
    for code, found in (parity.get("languages") or {}).items():
        lines.append(
            f"- {code}: {found['metric']} {found['package_score']:.2f}, {its} "
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


def _use(kind: str, facts: Mapping[str, Any], source: Path) -> list[str]:
    lang = next(iter(facts.get("languages") or facts.get("langs") or ["de"]))
    _, given = _WORDS[facts["reads"]]
    lines = ["## Use", "", "```", f"halve translate --model . --lang {lang} {given}", "```"]
    if kind in ("teacher", "tuned", "student") or facts.get("target") == "checkpoint":
        lines += [
            "",
            "It also loads in stock transformers with `from_pretrained`. Ask it, there and in other",
            f"servers, as it was taught, greedily ({lang}):",
            "",
            "```",
            *_prompt(source, lang).splitlines(),
            "```",
        ]
    return lines


def _prompt(source: Path, lang: str) -> str:
    """The whole prompt: a student asked otherwise translates worse. Where it reads, {…} stands for what changes."""
    family = family_for(read_config(source))
    spoken = ENGLISH if family.reads == "audio" else replace(ENGLISH, name="{source language}")
    asked = family.instruction(language(lang), spoken)
    return family.prompt_text(load_processor(source), asked).replace(SOURCE, "{text}")
