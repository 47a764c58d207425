"""Packages a student for one runtime, and publishes only what translates as the student does."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from export.config import PackageConfig, check_family, check_possible
from export.contest import check_contest, write_contest, write_scripts
from export.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from export.parity import check_parity
from export.runtime import open_translator
from export.scoring import SelectSet, open_select_sets
from export.targets import TARGETS, Job, generation_of, prompts_of
from halve import artefact, partials
from halve.artefact import Artefact
from halve.audio import SAMPLE_RATE_HZ
from halve.card import write_card
from halve.errors import InputError
from halve.families import family_for
from halve.languages import LANGUAGES, language
from halve.models import load_processor, read_config, resolve_model
from halve.progress import SILENT, Progress

_NOT_LISTED = (partials.CLAIM, artefact.TIMINGS)
"""Of the files in a draft, those that are not the package's."""
_CHECKING = {"force", "max_drop", "parity_segments", "batch_size"}
"""Settings that what is written does not depend on."""


def run_package(
    config: PackageConfig,
    model: Path,
    corpus: Path | None,
    out: Path,
    progress: Progress = SILENT,
    *,
    texts: Sequence[Path] = (),
) -> Artefact:
    """Writes a package and checks it against its student before it is published.

    Args:
        corpus: its `select` is what the check translates; without it the package is marked unchecked.
        texts: UTF-8 files in the languages translated into, whose tokens a trimmed vocabulary keeps, too.

    Raises:
        InputError: a precision that the target has not, a vocabulary that cannot be trimmed, texts that cannot be read or are not
            used, or no language named.
        FamilyError: the model cannot be packaged so.
        ParityError: the package is not faithful enough (`config.force` keeps it, marked).
    """
    check_possible(config)
    if texts and not config.trim_vocab:
        raise InputError("Texts for a vocabulary that is not trimmed", mend="add --trim-vocab")
    model = resolve_model(model)
    settings = read_config(model)
    family = family_for(settings)
    check_family(config, family, settings)
    check_contest(config, family)
    sets = (
        open_select_sets(corpus, config.langs, config.parity_segments, family.reads)
        if corpus
        else []
    )
    langs = [each.lang for each in sets] or [language(code).code for code in config.langs]
    if not langs:
        raise InputError("No language was named", expected="a corpus, or at least one --lang")
    parents = {"model": model} | ({"corpus": corpus} if corpus else {})
    parents |= {f"texts {number}": path for number, path in enumerate(texts, 1)}
    recipe = config.model_dump(mode="json")
    writing = (set(recipe) - _CHECKING, set(parents))
    with artefact.writing(
        out, "package", recipe, config.seed, parents, work_needs=writing
    ) as draft:
        folder = draft.work / "package"
        job = Job(
            config, model, corpus, langs, family, load_processor(model), folder, progress, texts
        )
        manifest = _written(job)
        manifest = replace(manifest, parity=_checked(job, sets, progress))
        write_manifest(folder, manifest)
        _move(folder, draft.path)
        facts = _card_facts(model, manifest)
        draft.extra |= {
            key: facts[key]
            for key in ("removed", "target", "precision", "bits_per_weight")
            if facts.get(key)
        }
        draft.extra["parity_passed"] = manifest.parity["passed"]
        if config.contest:
            write_scripts(draft.path, config)  # before the card, which says how much is stored
        write_card(draft.path, source=model, kind="package", facts=facts)
        if config.contest:
            facts["trimmed"] = config.trim_vocab
            write_contest(draft.path, config, facts, manifest.logical_parameters)
    return artefact.read(out, "package")


def _written(job: Job) -> Manifest:
    """Writes the package; one that an earlier run has written in full, and that was then not checked or refused, is taken."""
    if (job.folder / MANIFEST).is_file():
        manifest = read_manifest(job.folder)
        if all((job.folder / name).is_file() for name in manifest.files):
            job.progress.message("package: written by an earlier run")
            return manifest
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()
    job.progress.message(f"package: write {job.config.target} in {job.config.precision}")
    try:
        manifest = _manifest(job, TARGETS[job.config.target](job))
    except BaseException:
        shutil.rmtree(job.folder)  # half a package is nothing to go on from
        raise
    partials.sync(path for path in job.folder.rglob("*") if path.is_file())
    write_manifest(job.folder, manifest)  # last: it says that all is there
    return manifest


def _move(folder: Path, target: Path) -> None:
    """Moves the package's files where the artefact is; what a killed run has put there gives way."""
    for entry in target.iterdir():
        if entry == folder.parent or entry.name in _NOT_LISTED:
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for entry in folder.iterdir():
        entry.rename(target / entry.name)


def _templates(job: Job) -> dict[str, dict[str, tuple[str, str]]]:
    """A text model's prompts around the source text, by target and source: as its student would ask."""
    family = job.family
    if family.reads != "text":
        return {}
    return {
        code: {
            source.code: family.prompt_template(
                job.processor, family.instruction(language(code), source)
            )
            for source in LANGUAGES.values()
        }
        for code in job.langs
    }


def _manifest(job: Job, onnx: dict[str, Any] | None) -> Manifest:
    config = read_config(job.student)
    counts = job.family.count_parameters(config)
    parameters = counts.total
    if onnx and onnx["trimmed"]:
        rows = int(job.family.text_config(config)["vocab_size"]) - onnx["decoder"]["vocabulary"]
        # A tied head goes with the embeddings.
        tables = 2 if counts.head else 1
        parameters -= tables * rows * onnx["decoder"]["hidden"]
    files = sorted(entry.name for entry in job.folder.iterdir() if entry.is_file())
    generating = generation_of(job)
    suppressed, suppressed_first = job.family.suppressed(generating)
    return Manifest(
        target=job.config.target,
        precision=job.config.precision,
        family=job.family.name,
        languages=job.langs,
        max_audio_s=job.family.max_audio_s,
        sample_rate_hz=SAMPLE_RATE_HZ,
        prompt=prompts_of(job),
        end_ids=list(job.family.end_ids(generating)),
        files=files,
        logical_parameters=parameters,
        decoder_layers=counts.decoder_layers,
        onnx=onnx,
        templates=_templates(job),
        begins=job.family.reads == "text" and not job.processor.tokenizer.chat_template,
        suppressed_ids=list(suppressed),
        suppressed_first_ids=list(suppressed_first),
    )


def _checked(job: Job, sets: list[SelectSet], progress: Progress) -> dict[str, Any]:
    if not sets:
        reason = "not checked: no corpus was given"
        progress.warn(f"package: {reason}")
        return {"passed": None, "forced": False, "reason": reason, "languages": {}}
    opened = partial(open_translator, job.folder)
    parity = check_parity(job.config, job.student, opened, sets, progress)
    if parity["forced"]:
        progress.warn(f"package: kept by force: {'; '.join(parity['faults'])}")
    return parity


def _card_facts(model: Path, manifest: Manifest) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "target": manifest.target,
        "precision": manifest.precision,
        "languages": manifest.languages,
        "parity": manifest.parity,
        "logical_parameters": manifest.logical_parameters,
        "bits": manifest.onnx["bits"] if manifest.onnx else None,
        "bits_per_weight": manifest.onnx["bits_per_weight"] if manifest.onnx else None,
    }
    if manifest.onnx and manifest.onnx["trimmed"]:
        facts["kept_tokens"] = manifest.onnx["decoder"]["vocabulary"]
    if (model / artefact.RECORD).is_file():
        extra = artefact.read(model).extra
        facts |= {
            key: extra[key]
            for key in (
                *("removed", "ranked_by", "ranked_before", "base_model"),
                *("onto", "mean_of", "tuned", "tuned_before"),
            )
            if key in extra
        }
    return facts
