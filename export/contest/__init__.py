"""What a shared task wants beside a package: scripts that its organisers run, and a statement of size."""

import importlib.metadata
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.config import PackageConfig
from halve import artefact
from halve.errors import InputError
from halve.families import Family
from halve.json_files import write_json
from halve.lineage import RANKED, TUNED
from halve.origin import CARD
from halve.shards import iter_stored

IWSLT_AUTO_CLASS = "AutoModelForMultimodalLM"
"""What the organisers' runner loads an entry with."""
STATEMENT = "size.json"
_ENTRIES = {
    "iwslt": """
## In IWSLT's compression track

The organisers load this directory with stock transformers, as it is or quantised while loading; nothing of halve is
needed. `size.json` states its stored bytes, the bytes of its state_dict, its logical parameters and what was done to it.
""",
    "wmt": """
## In WMT's compression track

```
./setup.sh    # makes `environment` here: needs Python 3.11 or newer with venv, and a package index
./run.sh --lang-pair en-de --batch-size 16 --input FILE --output FILE
```

One line of output for each line of input; an empty line stays empty. What looks wrong with the output (its count, empty
lines, lines over twice as long as usual) is told on stderr. `size.json` states the stored bytes, for a checkpoint the
bytes of its state_dict, the logical parameters and what was done to the model.
""",
}
"""What a package's card says of its entry."""
_CODE = "code"
_SCRIPTS = ("setup.sh", "run.sh", "run.py")
_TARGET_NEEDS = {
    "onnx": ("onnxruntime", "tokenizers"),
    "checkpoint": ("torch", "transformers", "tokenizers", "accelerate", "safetensors"),
}
ITERATIVE = ("reference", "exact", "bounded", "racing")
"""Searches that score every layer's absence anew after each removal."""
_METHODS = {
    "qlora": "QLoRA fine-tuning",
    "lora": "LoRA fine-tuning",
    "full": "fine-tuning of all decoder weights",
}
_ALWAYS = ("numpy", "pydantic", "pyyaml", "soundfile", "soxr", "huggingface-hub", "safetensors")


def check_contest(config: PackageConfig, family: Family) -> None:
    """Refuses a package that the organisers could not run.

    Raises:
        InputError: IWSLT's runner loads checkpoints of models that hear, by one auto class; WMT's track translates text.
    """
    if config.contest == "iwslt" and config.target != "checkpoint":
        raise InputError(
            f"A package with target {config.target} cannot enter IWSLT's compression track",
            expected="target checkpoint: the organisers load it with stock transformers",
        )
    if config.contest == "iwslt" and (
        family.reads != "audio" or family.auto_class != IWSLT_AUTO_CLASS
    ):
        raise InputError(
            f"A model of family {family.name} cannot enter IWSLT's compression track: it loads with {family.auto_class}",
            expected=f"a model that hears and that the organisers' {IWSLT_AUTO_CLASS} loads",
        )
    if config.contest == "wmt" and family.reads != "text":
        raise InputError(
            f"A model of family {family.name} cannot enter WMT's compression track",
            expected="a model that reads text",
        )
    if config.contest == "wmt" and config.target not in _TARGET_NEEDS:
        raise InputError(
            f"A package with target {config.target} cannot enter WMT's compression track",
            expected=f"target {' or '.join(_TARGET_NEEDS)}",
        )
    if config.contest == "wmt":
        _requirements(config)  # before hours of work


def write_contest(
    folder: Path, config: PackageConfig, facts: Mapping[str, Any], parameters: int
) -> None:
    """Writes the statement of size, and what the card says of the contest.

    Args:
        folder: the package, complete but for this.
        facts: how the student was made: removed, tuned, target, precision, trimmed.
        parameters: logical parameters.
    """
    with (folder / CARD).open("a", encoding="utf8") as card:
        card.write(_ENTRIES[str(config.contest)])
    statement = {
        "stored_bytes": _stored_bytes(folder),
        "state_dict_bytes": state_dict_bytes(folder) if config.target == "checkpoint" else None,
        "logical_parameters": parameters,
        "techniques": techniques(facts),
    }
    write_json(folder / STATEMENT, statement)


def techniques(facts: Mapping[str, Any]) -> list[str]:
    """What was done to the model, in the terms that system descriptions use."""
    found = []
    if facts.get("removed"):
        layers = ", ".join(map(str, facts["removed"]))
        ways = [*facts.get(RANKED, ()), facts.get("ranked_by")]
        pruning = " and ".join(dict.fromkeys(map(_pruning, ways)))
        found.append(f"{pruning} ({len(facts['removed'])} layers: {layers})")
    stages = [*facts.get(TUNED, ()), *([facts["tuned"]] if facts.get("tuned") else [])]
    if any(stage.get("distilled") for stage in stages):
        found.append("sequence-level knowledge distillation")
    if any(stage.get("logits") for stage in stages):
        found.append("word-level knowledge distillation")
    methods = dict.fromkeys(stage["method"] for stage in stages)
    found += [_METHODS.get(method, str(method)) for method in methods]
    if facts.get("trimmed"):
        found.append("vocabulary trimming")
    if facts["precision"] not in ("bf16", "fp32", "fp16"):
        found.append(f"weight quantisation ({facts['target']}, {facts['precision']})")
    return found


def _pruning(ranked_by: str | None) -> str:
    if ranked_by in ITERATIVE:
        return "iterative decoder layer pruning"
    return f"decoder layer pruning, ranked by {ranked_by}" if ranked_by else "decoder layer pruning"


def state_dict_bytes(folder: Path) -> int:
    """Bytes of the tensors that the stock model's state_dict holds; serialising adds a few kilobytes."""
    return sum(stored.size_bytes for stored in iter_stored(folder))


def _stored_bytes(folder: Path) -> int:
    hidden = {"partial.json", artefact.TIMINGS, artefact.RECORD, STATEMENT}
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in hidden
        and path.relative_to(folder).parts[0] != "work"
    )


def write_scripts(folder: Path, config: PackageConfig) -> None:
    """For WMT, all that its organisers run."""
    if config.contest != "wmt":
        return
    templates = Path(__file__).parent
    for name in _SCRIPTS:
        shutil.copyfile(templates / name, folder / name)
        if name.endswith(".sh"):
            place = folder / name
            place.chmod(place.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    lines = _requirements(config)
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    for package in ("halve", "export"):
        shutil.copytree(
            templates.parents[1] / package,
            folder / _CODE / package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )


def _requirements(config: PackageConfig) -> list[str]:
    needs = [*_TARGET_NEEDS[config.target], *_ALWAYS]
    if config.precision == "nf4":
        needs.append("bitsandbytes")
    return [f"{name}=={_version(name)}" for name in sorted(set(needs))]


def _version(name: str) -> str:
    """The version of what is installed here; onnxruntime may be there in its build for GPUs.

    Raises:
        InputError: it is not installed.
    """
    for installed in (name, f"{name}-gpu"):
        try:
            # A local build's suffix (+cpu) is not on any index.
            return importlib.metadata.version(installed).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise InputError(
        f"{name} is not installed here, and the organisers' environment is to have the version that was tested",
        mend=f"pip install {name}",
    )
