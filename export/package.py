"""Packages a student for one runtime, and publishes only what translates as the student does."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.blocks import choose_block
from export.calibrate import Calibrated, Calibration, DataFree, Quantiser, read_samples
from export.checkpoint import DTYPES, write_nf4, write_plain
from export.config import PackageConfig, check_family, check_possible
from export.contest import check_contest, write_contest, write_scripts
from export.gguf_runtime import check_installed
from export.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from export.parity import check_parity
from export.quantise import Blocks, FloatArray
from export.runtime import open_translator
from export.scoring import SelectSet, open_select_sets
from export.trim import lines_of, said_in, trimmed
from export.vocabulary import TokenIds
from halve import artefact, environment, partials
from halve.arithmetic import roomy_dtype
from halve.artefact import Artefact
from halve.audio import SAMPLE_RATE_HZ
from halve.card import write_card
from halve.errors import FamilyError, InputError, MissingExtraError
from halve.families import Family, family_for
from halve.languages import LANGUAGES, language
from halve.models import load_model, load_processor, read_config, resolve_model
from halve.progress import SILENT, Advance, Progress

_BITS = {"fp32": 32, "fp16": 32, "int8": 8, "int4": 4}
_GGUF_BITS = {**_BITS, "fp16": 16}
_NOT_LISTED = (partials.CLAIM, artefact.TIMINGS)
"""Of the files in a draft, those that are not the package's."""
_CHECKING = {"force", "max_drop", "parity_segments", "batch_size"}
"""Settings that what is written does not depend on."""


@dataclass(frozen=True)
class _Job:
    """What a target's writer works on."""

    config: PackageConfig
    student: Path
    corpus: Path | None
    langs: list[str]
    family: Family
    processor: Any
    folder: Path
    progress: Progress
    texts: Sequence[Path] = ()


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
        job = _Job(
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


def _written(job: _Job) -> Manifest:
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


def _write_checkpoint(job: _Job) -> None:
    if job.config.precision == "nf4":
        write_nf4(job.student, job.folder, job.config.max_shard_bytes)
    else:
        dtype = DTYPES[job.config.precision]
        write_plain(job.student, job.folder, dtype, job.config.max_shard_bytes)


def _write_onnx(job: _Job) -> dict[str, Any]:
    _check_decoder(job)
    try:
        from export.to_onnx import Bits, write_onnx
    except ImportError:
        raise MissingExtraError("onnx", "export") from None
    config = job.config
    bits = _BITS[config.precision]
    exact = bits == 32
    calibration = _calibration(job, bits)
    method, quantise = _quantiser(job, bits, calibration)
    encoder_bits = config.encoder_bits or (bits if method == "gptq" else 8)
    head_bits = bits if exact else config.head_bits or bits
    chosen = Bits(
        decoder=bits,
        head=head_bits,
        embeddings=bits if exact else config.embedding_bits or bits,
        encoder=bits if exact else encoder_bits,
        block_size=config.block_size or _block(job, bits, head_bits),
        half=config.precision == "fp16",
        cache=config.kv_bits or (16 if config.precision == "fp16" else 32),
    )
    cache_peaks = calibration.cache_peaks if calibration and config.kv_bits else None
    if cache_peaks and method != "gptq":
        known = cache_peaks()
        cache_peaks = lambda: known  # noqa: E731
        _free(calibration)
        calibration = None
    with job.progress.task("package: quantise", total=None) as advance:
        facts, _ = write_onnx(
            job.folder,
            job.student,
            job.family,
            job.processor,
            chosen,
            _kept(job),
            quantise and _Told(quantise, advance),
            cache_peaks,
        )
    _free(calibration)
    facts["quantise"] = method
    _write_tokenizer(job)
    return facts


def _free(calibration: Calibration | None) -> None:
    """Lets the student go that was calibrated on: the check loads it again."""
    if calibration is not None:
        calibration.close()
        environment.release_gpu_memory()


def _block(job: _Job, bits: int, head_bits: int) -> int:
    config = read_config(job.student)
    counts, text = job.family.count_parameters(config), job.family.text_config(config)
    # A tied head is counted with the embeddings, and read at each step all the same.
    head = counts.head or counts.embeddings
    widths = {int(text["hidden_size"]), int(text["intermediate_size"])}
    if text.get("head_dim"):
        widths.add(int(text["head_dim"]) * int(text["num_attention_heads"]))
    return choose_block((counts.decoder * bits + head * head_bits) / 8, widths)


def _write_gguf(job: _Job) -> dict[str, Any]:
    _check_decoder(job)
    if job.corpus:
        check_installed()  # what is written here is to be run here
    try:
        from export.to_gguf import write_gguf
        from export.to_onnx import Bits
    except ImportError as error:
        lacks_gguf = str(error.name).startswith("gguf")
        raise MissingExtraError(str(error.name), "gguf" if lacks_gguf else "export") from None
    config = job.config
    bits = _GGUF_BITS[config.precision]
    exact = bits >= 16
    chosen = Bits(
        decoder=bits,
        head=bits if exact else config.head_bits or bits,
        embeddings=bits if exact else config.embedding_bits or bits,
        encoder=32 if exact else config.encoder_bits or 8,
    )
    facts = write_gguf(job.folder, job.student, job.family, job.processor, chosen, _kept(job))
    del facts["bits"]["cache"]  # llama.cpp's choice
    facts["quantise"] = "none" if exact else "rtn"
    _write_tokenizer(job)
    return facts


def _check_decoder(job: _Job) -> None:
    if job.family.no_onnx:
        raise FamilyError(
            f"{job.family.name} is not supported as {job.config.target.upper()}: {job.family.no_onnx}",
            mend="package this model with --target checkpoint",
        )


def _write_tokenizer(job: _Job) -> None:
    tokenizer = job.processor.tokenizer.backend_tokenizer.to_str()
    (job.folder / "tokenizer.json").write_text(tokenizer, encoding="utf8")


def _method(job: _Job, bits: int) -> str:
    """How weights become codes."""
    config = job.config
    if bits == 32:
        return "none"
    if min(bits, config.encoder_bits or 8, config.head_bits or 8) == 8:
        return "rtn"
    if config.quantise == "auto":
        return "gptq" if job.corpus else "search"
    return config.quantise


def _calibration(job: _Job, bits: int) -> Calibration | None:
    """The student on segments of `train`, where a setting asks for it.

    Raises:
        InputError: calibration without a corpus.
    """
    method = _method(job, bits)
    if method != "gptq" and not job.config.kv_bits:
        return None
    if job.corpus is None:
        what = "GPTQ" if method == "gptq" else "A cache in 8 bits"
        raise InputError(f"{what} needs a corpus to calibrate on", mend="name --corpus")
    speech = load_model(job.student, dtype=roomy_dtype(job.student, progress=job.progress))
    samples = read_samples(job.corpus, job.langs, speech, job.config.calibration_segments)
    return Calibration(speech, samples)


def _quantiser(
    job: _Job, bits: int, calibration: Calibration | None
) -> tuple[str, Quantiser | None]:
    """The method that weights are quantised with, and what does it."""
    method = _method(job, bits)
    if method == "none":
        return method, None
    if method == "gptq":
        assert calibration is not None
        return method, Calibrated(calibration)
    searched = method != "rtn"
    return method, DataFree(searched, method == "k-quant")


@dataclass(frozen=True)
class _Told:
    """A quantiser that says what it has done."""

    quantise: Quantiser
    advance: Advance

    def __call__(
        self, keys: Sequence[str], weight: FloatArray, bits: int, block_size: int
    ) -> Blocks:
        blocks = self.quantise(keys, weight, bits, block_size)
        self.advance(1, note=keys[0] if keys else "")
        return blocks


TARGETS: dict[str, Callable[[_Job], dict[str, Any] | None]] = {
    "checkpoint": _write_checkpoint,
    "onnx": _write_onnx,
    "gguf": _write_gguf,
}


def _prompts(job: _Job) -> dict[str, tuple[list[int], list[int]]]:
    family = job.family
    return {
        code: family.prompt_ids(job.processor, family.instruction(language(code)))
        for code in job.langs
    }


def _generating(job: _Job) -> Any:
    """What families ask for in a model: its generation config. No model is loaded here."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(str(job.student))
    except OSError:
        # Without the file, stock code goes by the model's config when it loads a model.
        generation = GenerationConfig.from_model_config(read_config(job.student))
    return type("Generating", (), {"generation_config": generation})


def _kept(job: _Job) -> TokenIds | None:
    """The tokens that a trimmed package keeps; None where nothing is trimmed."""
    if not job.config.trim_vocab:
        return None
    if job.corpus is None:
        raise InputError("Trimming the vocabulary needs a corpus", mend="name --corpus")
    prompts = {id_ for ids in _prompts(job).values() for part in ids for id_ in part}
    return trimmed(
        job.processor.tokenizer.backend_tokenizer,
        said_in(job.corpus, job.langs, job.progress) + lines_of(job.texts),
        prompts | set(job.family.end_ids(_generating(job))),
        int(job.family.text_config(read_config(job.student))["vocab_size"]),
        job.progress,
    )


def _templates(job: _Job) -> dict[str, dict[str, tuple[str, str]]]:
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


def _manifest(job: _Job, onnx: dict[str, Any] | None) -> Manifest:
    config = read_config(job.student)
    counts = job.family.count_parameters(config)
    parameters = counts.total
    if onnx and onnx["trimmed"]:
        rows = int(job.family.text_config(config)["vocab_size"]) - onnx["decoder"]["vocabulary"]
        # A tied head goes with the embeddings.
        tables = 2 if counts.head else 1
        parameters -= tables * rows * onnx["decoder"]["hidden"]
    files = sorted(entry.name for entry in job.folder.iterdir() if entry.is_file())
    generating = _generating(job)
    suppressed, suppressed_first = job.family.suppressed(generating)
    return Manifest(
        target=job.config.target,
        precision=job.config.precision,
        family=job.family.name,
        languages=job.langs,
        max_audio_s=job.family.max_audio_s,
        sample_rate_hz=SAMPLE_RATE_HZ,
        prompt=_prompts(job),
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
            for key in ("removed", "ranked_by", "onto", "mean_of", "base_model", "tuned")
            if key in extra
        }
    return facts
