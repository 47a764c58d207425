"""What a package's target is written by: checkpoints, ONNX graphs, GGUF files, and how their weights become codes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.blocks import choose_block
from export.calibrate import Calibrated, Calibration, DataFree, Quantiser, read_samples
from export.checkpoint import DTYPES, write_nf4, write_plain
from export.config import PackageConfig
from export.gguf_runtime import check_installed
from export.quantise import Blocks, FloatArray
from export.trim import lines_of, said_in, trimmed
from export.vocabulary import TokenIds
from halve import environment
from halve.arithmetic import roomy_dtype
from halve.errors import FamilyError, InputError, MissingExtraError
from halve.families import Family
from halve.languages import language
from halve.models import load_model, read_config
from halve.progress import Progress

_BITS = {"fp32": 32, "fp16": 32, "int8": 8, "int4": 4}
_GGUF_BITS = {**_BITS, "fp16": 16}


@dataclass(frozen=True)
class Job:
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


def _write_checkpoint(job: Job) -> None:
    if job.config.precision == "nf4":
        write_nf4(job.student, job.folder, job.config.max_shard_bytes)
    else:
        dtype = DTYPES[job.config.precision]
        write_plain(job.student, job.folder, dtype, job.config.max_shard_bytes)


def _write_onnx(job: Job) -> dict[str, Any]:
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
    with _told(job, quantise) as quantise:
        facts, _ = write_onnx(
            job.folder,
            job.student,
            job.family,
            job.processor,
            chosen,
            _kept(job),
            quantise,
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


def _block(job: Job, bits: int, head_bits: int) -> int:
    config = read_config(job.student)
    counts, text = job.family.count_parameters(config), job.family.text_config(config)
    # A tied head is counted with the embeddings, and read at each step all the same.
    head = counts.head or counts.embeddings
    widths = {int(text["hidden_size"]), int(text["intermediate_size"])}
    if text.get("head_dim"):
        widths.add(int(text["head_dim"]) * int(text["num_attention_heads"]))
    return choose_block((counts.decoder * bits + head * head_bits) / 8, widths)


def _write_gguf(job: Job) -> dict[str, Any]:
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
    if chosen.encoder < 8:  # its graph is onnxruntime's, as in ONNX packages
        facts["quantise_encoder"] = "search"
    _write_tokenizer(job)
    return facts


def _check_decoder(job: Job) -> None:
    if job.family.no_onnx:
        raise FamilyError(
            f"{job.family.name} is not supported as {job.config.target.upper()}: {job.family.no_onnx}",
            mend="package this model with --target checkpoint",
        )


def _write_tokenizer(job: Job) -> None:
    tokenizer = job.processor.tokenizer.backend_tokenizer.to_str()
    (job.folder / "tokenizer.json").write_text(tokenizer, encoding="utf8")


def _method(job: Job, bits: int) -> str:
    """How weights become codes."""
    config = job.config
    if bits == 32:
        return "none"
    if min(bits, config.encoder_bits or 8, config.head_bits or 8) == 8:
        return "rtn"
    if config.quantise == "auto":
        return "gptq" if job.corpus else "search"
    return config.quantise


def _calibration(job: Job, bits: int) -> Calibration | None:
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
    job: Job, bits: int, calibration: Calibration | None
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


@contextmanager
def _told(job: Job, quantise: Quantiser | None) -> Iterator[Quantiser | None]:
    """A quantiser that says what it has done."""
    if quantise is None:
        yield None
        return
    with job.progress.task("package: quantise", total=None) as advance:

        def told(keys: Sequence[str], weight: FloatArray, bits: int, block_size: int) -> Blocks:
            blocks = quantise(keys, weight, bits, block_size)
            advance(1, note=keys[0] if keys else "")
            return blocks

        yield told


def prompts_of(job: Job) -> dict[str, tuple[list[int], list[int]]]:
    family = job.family
    return {
        code: family.prompt_ids(job.processor, family.instruction(language(code)))
        for code in job.langs
    }


def generation_of(job: Job) -> Any:
    """What families ask for in a model: its generation config. No model is loaded here."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(str(job.student))
    except OSError:
        # Without the file, stock code goes by the model's config when it loads a model.
        generation = GenerationConfig.from_model_config(read_config(job.student))
    return type("Generating", (), {"generation_config": generation})


def _kept(job: Job) -> TokenIds | None:
    """The tokens that a trimmed package keeps; None where nothing is trimmed."""
    if not job.config.trim_vocab:
        return None
    if job.corpus is None:
        raise InputError("Trimming the vocabulary needs a corpus", mend="name --corpus")
    prompts = {id_ for ids in prompts_of(job).values() for part in ids for id_ in part}
    return trimmed(
        job.processor.tokenizer.backend_tokenizer,
        said_in(job.corpus, job.langs, job.progress) + lines_of(job.texts),
        prompts | set(job.family.end_ids(generation_of(job))),
        int(job.family.text_config(read_config(job.student))["vocab_size"]),
        job.progress,
    )


TARGETS: dict[str, Callable[[Job], dict[str, Any] | None]] = {
    "checkpoint": _write_checkpoint,
    "onnx": _write_onnx,
    "gguf": _write_gguf,
}
