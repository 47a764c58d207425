"""Settings of merging and packaging."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from halve.config import Config, Positive, Seed
from halve.errors import FamilyError, InputError
from halve.families import Family

PRECISIONS = {
    "checkpoint": ("bf16", "fp16", "fp32", "nf4"),
    "onnx": ("fp32", "fp16", "int8", "int4"),
    "gguf": ("fp32", "fp16", "int8", "int4"),
}


GGUF_BLOCK = 32
"""Weights that share a scale in llama.cpp's types."""
_ROUNDING = ("block_size", "head_bits", "embedding_bits", "encoder_bits", "quantise")
"""Settings of how weights become integers."""


class MergeConfig(Config):
    """How an adapter becomes part of its base model."""

    onto: Literal["base", "dequantized", "auto"] = "base"
    """base: onto the stored weights. dequantized: onto the weights as NF4 rounds them, which is what
    QLoRA trained on. auto: makes both, scores both on `select` and keeps the better."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that the student's weights are stored in."""
    langs: tuple[str, ...] = ()
    """Languages that `auto` scores; those that the adapter was tuned for where empty."""
    select_segments: Positive | None = None
    """`auto` scores at most so many segments of `select`, spread evenly over it."""
    batch_size: Positive = 16
    """Segments translated at once while scoring."""
    requantized: bool = False
    """With `auto`: also scores the adapter on its quantised base and each student quantised to NF4
    again, and keeps the better of those: for students that will be stored in 4 bits."""
    verify: Literal["structure", "full"] = "structure"
    """structure: compares the headers of the student's files with the base model's, in little memory;
    full: also loads the student in stock transformers."""
    max_shard_bytes: Positive = 1_000_000_000
    """A file of weights is at most so large."""

    @model_validator(mode="after")
    def _scored_where_there_is_a_choice(self) -> Self:
        if self.requantized and self.onto != "auto":
            raise ValueError(
                f"requantized chooses between two bases: it needs onto auto, not {self.onto}"
            )
        return self


class PackageConfig(Config):
    """What a student is packaged as."""

    target: Literal["checkpoint", "onnx", "gguf"] = "onnx"
    """checkpoint: for stock transformers; onnx: for onnxruntime; gguf: the decoder for llama.cpp, the rest for
    onnxruntime."""
    precision: Literal["bf16", "nf4", "fp32", "fp16", "int8", "int4"] = "int8"
    """bf16, fp16, fp32 or nf4 of a checkpoint; fp32, fp16 (for GPUs), int8 or int4 of an ONNX package;
    fp32, fp16, int8 (Q8_0) or int4 (Q4_0) of a GGUF package."""
    langs: tuple[str, ...] = ()
    """Languages that the package translates into; those of the corpus where empty."""
    parity_segments: Positive | None = None
    """Compares the package with its student on at most so many segments of `select`; all where None."""
    max_drop: Annotated[float, Field(ge=0)] = 1.0
    """The most points of the selection metric that a quantised package may lose to its student."""
    contest: Literal["iwslt", "wmt"] | None = None
    """Also write what a compression track's organisers run and want to know."""
    force: bool = False
    """Keeps a package that is not faithful enough, and marks it."""
    block_size: Literal[16, 32, 64, 128] | None = None
    """Weights that share a scale in an int8 or int4 package: 16, 32, 64 or 128; always 32 in GGUF. Where not given, 128
    for a decoder of up to 64 MB, else 32: in large blocks a single row is faster, but rows are computed one by one."""
    head_bits: Literal[4, 8] | None = None
    """Bits of the head's weights; those of `precision` where None."""
    embedding_bits: Literal[4, 8] | None = None
    """Bits of the embedding table; those of `precision` where None."""
    kv_bits: Literal[8] | None = None
    """8: an int8 or int4 ONNX package keeps keys and values in 8 bits, their scales calibrated on `train` by the student in
    float32: a quarter of the memory, and faster steps after long audio. As they are computed where None."""
    trim_vocab: bool = False
    """ONNX and GGUF of models that hear: keeps only the tokens that the corpus's translations into `langs` need
    (`train` and `select`), those of `--vocab-texts`, and every single byte or character. The same texts, greedily, wherever the student says no other
    token. The check on `select` flatters, as its references' tokens are kept: packaging says what share of new translations'
    tokens is expected to be missing. A beam search weighs the kept tokens alone."""
    encoder_bits: Literal[4, 8, 32] | None = None
    """Bits of the audio encoder's linear layers in an int8 or int4 package. Where None, those of
    `precision` if the weights are calibrated, else 8."""
    quantise: Literal["auto", "rtn", "search", "k-quant", "gptq"] = "auto"
    """ONNX: how weights become 4-bit codes. rtn: to nearest, the scale holds a block's extreme; search: with
    the scale of least squared error; k-quant: that, and a zero point a block; gptq: calibrated on `train`,
    each weight's error made up for by the others. auto: gptq where a corpus is named, else search. An embedding table
    in 4 bits, and a head that is tied to it, are searched whatever the method."""
    calibration_segments: Positive = 128
    """gptq and kv_bits read so many segments of `train`, spread evenly over it and over the languages."""
    batch_size: Positive = 8
    """Segments translated at once in the parity check."""
    seed: Seed = 0
    """Of the bootstrap that gives the score difference its interval."""
    max_shard_bytes: Positive = 1_000_000_000
    """A file of a checkpoint's weights is at most so large."""


def check_possible(config: PackageConfig) -> None:
    """Refuses settings that no student can be packaged with.

    Raises:
        InputError: a precision or a way that the target has not, or one that the precision does not use.
    """
    if config.trim_vocab and config.target == "checkpoint":
        raise InputError(
            "A checkpoint cannot have a trimmed vocabulary: stock transformers takes a token's id for "
            "its row",
            expected="target onnx or gguf",
        )
    if config.target == "gguf" and config.quantise not in ("auto", "rtn"):
        raise InputError(
            f"Target gguf cannot be quantised by {config.quantise}",
            expected="rtn: llama.cpp's own 8-bit and 4-bit types, to nearest",
            mend="leave --quantise out, or use --target onnx",
        )
    if config.target == "gguf" and config.block_size not in (None, GGUF_BLOCK):
        raise InputError(
            f"Target gguf has no blocks of {config.block_size} weights", expected="blocks of 32"
        )
    known = PRECISIONS[config.target]
    if config.precision not in known:
        raise InputError(
            f"Target {config.target} has no precision {config.precision}",
            expected=f"one of {', '.join(known)}",
        )
    _check_rounding(config)
    _check_quantise(config)
    if config.kv_bits and (config.target != "onnx" or config.precision not in ("int8", "int4")):
        raise InputError(
            f"Target {config.target} in {config.precision} cannot keep keys and values in {config.kv_bits} bits",
            expected="target onnx in int8 or int4",
            mend="leave --kv-bits out",
        )


def _check_rounding(config: PackageConfig) -> None:
    """Refuses settings of halve's own rounding for what is not rounded so: NF4 is bitsandbytes' own."""
    given = [name for name in _ROUNDING if getattr(config, name) not in (None, "auto")]
    if given and (config.target == "checkpoint" or config.precision in ("fp32", "fp16")):
        raise InputError(
            f"{' and '.join(given)} cannot be chosen for target {config.target} in {config.precision}",
            expected="target onnx or gguf in int8 or int4",
            mend=f"leave {' and '.join(given)} out",
        )


def _check_quantise(config: PackageConfig) -> None:
    """Refuses a way of rounding to 4 bits where nothing has so few."""
    widths = (config.encoder_bits, config.head_bits)  # the table is not rounded by it
    if config.precision == "int8" and 4 not in widths and config.quantise not in ("auto", "rtn"):
        raise InputError(
            f"Nothing of this package has 4 bits, and 8 are rounded to nearest, not by {config.quantise}",
            expected="--precision int4, or a part in 4 bits",
            mend="leave --quantise out",
        )


def check_family(config: PackageConfig, family: Family, model: Mapping[str, Any]) -> None:
    """Refuses settings that no student of a family, or of a model, can be packaged with.

    Args:
        model: the config of the student, or of the teacher that it is made of.

    Raises:
        InputError: a trimmed vocabulary of a model that reads.
        FamilyError: an ONNX package of a decoder that has none.
    """
    if config.target in ("onnx", "gguf") and family.no_onnx:
        raise FamilyError(
            f"{family.name} models cannot be written as {config.target.upper()}: {family.no_onnx}",
            mend="package it with --target checkpoint --precision nf4 (or bf16)",
        )
    if config.target == "onnx" and (found := family.unlike_onnx(model)):
        raise FamilyError(
            f"A model with {found} cannot be written as ONNX yet",
            expected=f"a decoder of type {', '.join(sorted(family.onnx_layouts))} in its plain form",
            mend="package it with --target checkpoint --precision nf4 (or bf16)",
        )
    if config.trim_vocab and family.reads == "text":
        raise InputError(
            f"A model of family {family.name} cannot have a trimmed vocabulary: it reads with the same tokens "
            "as it writes, and what it will be given to read is not known",
            expected="a model that hears",
            mend="leave --trim-vocab (in a recipe, trim_vocab) out",
        )
