"""The ways in which a student can be stored, and what they take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from halve.families import Family
from halve.families.base import Counts
from pipeline.stage_costs import NF4_BYTES

GRAPH_BYTES = 500_000
"""An ONNX package's graphs without their weights, about."""
_BYTES = {4: 0.5 + 2 / 32, 8: 1 + 2 / 32, 16: 2.0}
"""Of a weight by bits; quantised ones share a half-precision scale among 32 (small decoders' 4-bit weights among 128: a little less)."""


@dataclass(frozen=True)
class Form:
    """How a student is stored."""

    package: str
    note: str
    decoder_bytes: float
    """Of each parameter of the decoder layers."""
    tables_bytes: float
    """Of each parameter of embeddings and head."""
    tower_bytes: float
    """Of each parameter of the audio encoder."""
    settings: dict[str, Any]
    """The recipe's section of it."""
    trims: bool = False
    points_lost: float = 0.0
    """A guess at what storing so costs, in points of the selection metric: only to break ties in rank."""


FORMS = (
    Form("checkpoint bf16", "bfloat16 everywhere", 2.0, 2.0, 2.0, {"precision": "bf16"}),
    Form(
        "checkpoint nf4",
        "NF4 in the decoder, the rest bfloat16",
        NF4_BYTES,
        2.0,
        2.0,
        {"precision": "nf4"},
        points_lost=0.6,
    ),
    Form(
        "onnx int8",
        "8 bits everywhere",
        _BYTES[8],
        _BYTES[8],
        _BYTES[8],
        {"precision": "int8"},
        points_lost=0.1,
    ),
    Form(
        "onnx int4, tables in 8",
        "4 bits in the decoder, 8 in embeddings, head and encoder",
        _BYTES[4],
        _BYTES[8],
        _BYTES[8],
        {"precision": "int4", "head_bits": 8, "embedding_bits": 8, "encoder_bits": 8},
        points_lost=0.3,
    ),
    Form(
        "onnx int4",
        "4 bits in decoder, embeddings and head, 8 in the encoder",
        _BYTES[4],
        _BYTES[4],
        _BYTES[8],
        {"precision": "int4", "encoder_bits": 8},
        points_lost=0.4,
    ),
    Form(
        "onnx int4 throughout",
        "4 bits everywhere",
        _BYTES[4],
        _BYTES[4],
        _BYTES[4],
        {"precision": "int4", "encoder_bits": 4},
        points_lost=0.8,
    ),
)


def forms(trims: bool, unseen_share: float = 0.0) -> Iterator[Form]:
    """Every way to store a student; with a trimmed vocabulary too where that can be had.

    Args:
        unseen_share: of new translations' tokens, those that the trimmed vocabulary is expected to lack: as many
            points in a hundred are taken for lost, at the least.
    """
    for form in FORMS:
        yield form
        if trims and form.package.startswith("onnx"):
            settings = {**form.settings, "trim_vocab": True}
            yield replace(
                form,
                package=f"{form.package}, trimmed",
                settings=settings,
                trims=True,
                points_lost=form.points_lost + 100 * unseen_share,
            )


def stored_bytes(counts: Counts, form: Form) -> float:
    """Stored bytes of a student's weights, and of the graphs where there are some."""
    tables = counts.embeddings + counts.head
    rest = counts.total - counts.decoder - tables - counts.audio_tower
    is_onnx = form.package.startswith("onnx")
    graphs = GRAPH_BYTES if is_onnx else 0
    if is_onnx and not counts.head:
        tables += counts.embeddings  # a tied one is looked up in one file and multiplied in another
    return (
        counts.decoder * form.decoder_bytes
        + tables * form.tables_bytes
        + counts.audio_tower * form.tower_bytes
        + rest * max(form.decoder_bytes, 2.0 if form.tables_bytes == 2.0 else 0.0)
        + graphs
    )


def trimmed(counts: Counts, family: Family, config: dict[str, Any], kept: int) -> Counts:
    """The counts with so many tokens kept in embeddings and head."""
    share = min(1.0, kept / int(family.text_config(config)["vocab_size"]))
    embeddings, head = round(counts.embeddings * share), round(counts.head * share)
    gone = counts.embeddings + counts.head - embeddings - head
    return replace(counts, total=counts.total - gone, embeddings=embeddings, head=head)
