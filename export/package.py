"""Packages a student for one runtime, and publishes only what translates as the student does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.card import write_card
from export.checkpoint import DTYPES, write_nf4, write_plain
from export.config import PackageConfig
from export.manifest import MANIFEST, Manifest, write_manifest
from export.parity import check_parity
from export.runtime import open_translator
from export.scoring import SelectSet, open_select_sets
from halve import artefact
from halve.artefact import Artefact
from halve.audio import SAMPLE_RATE_HZ
from halve.errors import FamilyError, InputError, MissingExtraError
from halve.families import Family, family_for
from halve.languages import language
from halve.models import load_processor, read_config, resolve_model
from halve.progress import SILENT, Progress

PRECISIONS = {
    "checkpoint": ("bf16", "fp16", "fp32", "nf4"),
    "onnx": ("fp32", "int8", "int4"),
    "gguf": (),
}
_BITS = {"fp32": 32, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class _Job:
    """What a target's writer works on."""

    config: PackageConfig
    student: Path
    family: Family
    processor: Any
    folder: Path


def run_package(
    config: PackageConfig,
    model: Path,
    corpus: Path | None,
    out: Path,
    progress: Progress = SILENT,
) -> Artefact:
    """Writes a package and checks it against its student before it is published.

    Args:
        corpus: its `select` is what the check translates; without it the package is marked unchecked.

    Raises:
        InputError: a precision that the target has not, or no language named.
        FamilyError: the model cannot be packaged so.
        ParityError: the package is not faithful enough (`config.force` keeps it, marked).
    """
    _check_precision(config)
    model = resolve_model(model)
    family = family_for(read_config(model))
    sets = open_select_sets(corpus, config.langs, config.parity_segments) if corpus else []
    langs = [each.lang for each in sets] or [language(code).code for code in config.langs]
    if not langs:
        raise InputError("No language was named", expected="a corpus, or at least one --lang")
    parents = {"model": model} | ({"corpus": corpus} if corpus else {})
    recipe = config.model_dump(mode="json")
    with artefact.writing(out, "package", recipe, config.seed, parents) as draft:
        job = _Job(config, model, family, load_processor(model), draft.path)
        progress.message(f"package: write {config.target} in {config.precision}")
        onnx = TARGETS[config.target](job)
        manifest = _manifest(job, langs, onnx)
        write_manifest(draft.path, manifest)
        manifest = replace(manifest, parity=_checked(job, sets, progress))
        write_manifest(draft.path, manifest)
        facts = _card_facts(model, manifest)
        draft.extra |= {
            key: facts[key] for key in ("removed", "target", "precision") if key in facts
        }
        draft.extra["parity_passed"] = manifest.parity["passed"]
        write_card(draft.path, source=model, kind="package", facts=facts)
    return artefact.read(out, "package")


def _check_precision(config: PackageConfig) -> None:
    if config.target == "gguf":
        raise FamilyError(
            "Target gguf is not supported yet: llama.cpp's own audio path differs from the model's, and "
            "halve does not yet feed it embeddings",
            expected="target onnx (as fast on CPUs) or checkpoint",
        )
    known = PRECISIONS[config.target]
    if config.precision not in known:
        raise InputError(
            f"Target {config.target} has no precision {config.precision}",
            expected=f"one of {', '.join(known)}",
        )


def _write_checkpoint(job: _Job) -> None:
    if job.config.precision == "nf4":
        write_nf4(job.student, job.folder, job.config.max_shard_bytes)
    else:
        dtype = DTYPES[job.config.precision]
        write_plain(job.student, job.folder, dtype, job.config.max_shard_bytes)


def _write_onnx(job: _Job) -> dict[str, Any]:
    try:
        from export.to_onnx import Bits, write_onnx
    except ImportError:
        raise MissingExtraError("onnx", "export") from None
    config = job.config
    bits = _BITS[config.precision]
    exact = bits == 32
    chosen = Bits(
        decoder=bits,
        head=bits if exact else config.head_bits or bits,
        embeddings=bits if exact else config.embedding_bits or bits,
        encoder=bits if exact else config.encoder_bits,
        block_size=config.block_size,
    )
    facts, _ = write_onnx(job.folder, job.student, job.family, job.processor, chosen)
    tokenizer = job.processor.tokenizer.backend_tokenizer.to_str()
    (job.folder / "tokenizer.json").write_text(tokenizer, encoding="utf8")
    return facts


def _refuse(job: _Job) -> None:
    raise FamilyError(f"Target {job.config.target} is not supported")


TARGETS: dict[str, Callable[[_Job], dict[str, Any] | None]] = {
    "checkpoint": _write_checkpoint,
    "onnx": _write_onnx,
    "gguf": _refuse,
}


def _manifest(job: _Job, langs: list[str], onnx: dict[str, Any] | None) -> Manifest:
    from transformers import GenerationConfig

    family, processor = job.family, job.processor
    generation = GenerationConfig.from_pretrained(str(job.student))
    stand_in = type("Generating", (), {"generation_config": generation})
    prompts = {
        code: family.prompt_ids(processor, family.instruction(language(code))) for code in langs
    }
    files = sorted(entry.name for entry in job.folder.iterdir() if entry.is_file())
    return Manifest(
        target=job.config.target,
        precision=job.config.precision,
        family=family.name,
        languages=langs,
        max_audio_s=family.max_audio_s,
        sample_rate_hz=SAMPLE_RATE_HZ,
        prompt=prompts,
        end_ids=list(family.end_ids(stand_in)),
        files=[name for name in files if name not in ("partial.json", artefact.TIMINGS, MANIFEST)],
        onnx=onnx,
    )


def _checked(job: _Job, sets: list[SelectSet], progress: Progress) -> dict[str, Any]:
    if not sets:
        reason = "not checked: no corpus was given"
        progress.warn(f"package: {reason}")
        return {"passed": None, "forced": False, "reason": reason, "languages": {}}
    translator = open_translator(job.folder)
    try:
        parity = check_parity(job.config, job.student, translator, sets, progress)
    finally:
        translator.close()
    if parity["forced"]:
        progress.warn(f"package: kept by force: {'; '.join(parity['faults'])}")
    return parity


def _card_facts(model: Path, manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "target": manifest.target,
        "precision": manifest.precision,
        "languages": manifest.languages,
        "parity": manifest.parity,
        "bits": manifest.onnx["bits"] if manifest.onnx else None,
    }
    if (model / artefact.RECORD).is_file():
        extra = artefact.read(model).extra
        facts |= {key: extra[key] for key in ("removed", "onto", "base_model") if key in extra}
    return facts
