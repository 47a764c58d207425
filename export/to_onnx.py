"""Writes a student's parts as ONNX graphs, straight from its safetensors files.

Three parts: audio encoder with projector, token embedding table, decoder with key-value cache. The
tensors are read one at a time, so that memory does not grow with the model.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.calibrate import Quantiser
from export.decoder_graph import DecoderWriter, check_layer, geometry_of
from export.embeddings import write_table
from export.encoder_graph import write_encoder
from export.frontend import LogMel
from export.graph import GraphWriter, Stored
from export.vocabulary import VOCABULARY, TokenIds
from halve.errors import ArtefactError, FamilyError
from halve.families import Family
from halve.shards import read_index

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Bits:
    """How many bits a weight of each part is stored in; 32 leaves it as it is."""

    decoder: int
    head: int
    embeddings: int
    encoder: int
    block_size: int = 32
    half: bool = False
    """Whether what is not quantised is stored and computed in float16."""


class TensorReader:
    """Reads single tensors of a checkpoint as float32."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._index = read_index(model)

    def __call__(self, key: str) -> FloatArray:
        """One tensor by its key on disk.

        Raises:
            ArtefactError: the checkpoint has none of this name, or its file is damaged.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        if key not in self._index:
            raise ArtefactError(f"{self._model} has no tensor {key}")
        path = self._model / self._index[key]
        try:
            with safe_open(str(path), framework="pt") as file:
                tensor = file.get_tensor(key)
        except SafetensorError as error:
            raise ArtefactError(
                f"{path} is damaged ({error})", mend="copy or make it again"
            ) from None
        values: FloatArray = tensor.to(torch.float32).numpy()
        return values

    def suffixes(self, prefix: str) -> set[str]:
        """What follows `prefix` in the keys that begin with it."""
        return {key.removeprefix(prefix) for key in self._index if key.startswith(prefix)}


def write_onnx(
    folder: Path,
    student: Path,
    family: Family,
    processor: Any,
    bits: Bits,
    kept: TokenIds | None = None,
    quantise: Quantiser | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Writes all parts of an ONNX package but its tokenizer.

    Args:
        quantise: how linear layers' weights become codes; by the weights alone where None.
        kept: ascending ids of the tokens to keep; all where None.

    Returns:
        The facts that package.json records for the runtime, and the names of the files.

    Raises:
        FamilyError: the model has a part that cannot be written.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(student), local_files_only=True)
    read = TensorReader(student)
    listens = family.reads == "audio"
    front_end = _front_end(processor) if listens else None
    geometry = geometry_of(config.get_text_config())
    rows: Any = slice(None)
    if kept is not None:
        rows, geometry = kept, replace(geometry, vocabulary=len(kept))
        np.save(folder / VOCABULARY, kept.astype(np.int32), allow_pickle=False)
    biased = check_layer(read.suffixes(f"{family.disk_layers}0."))
    block = bits.block_size
    files = []
    stored: dict[str, Stored] = {}
    if listens:
        graph = GraphWriter(folder, "encoder", quantise, bits.half)
        tower, projector = family.disk_audio_tower, family.disk_projector
        files += write_encoder(
            graph, config.audio_config, tower, projector, read, bits.encoder, block
        )
        stored["encoder"] = sum(graph.stored.values(), Stored())
    graph = GraphWriter(folder, "decoder", quantise, bits.half)
    writer = DecoderWriter(graph, geometry, biased, bits.decoder, bits.head, block)
    norm = family.disk_layers.removesuffix("layers.") + "norm.weight"
    embeddings = f"{family.disk_embeddings}weight"
    # A tied head is not stored, and not calibrated.
    own = bool(read.suffixes(family.disk_head))
    head = f"{family.disk_head}weight" if own else embeddings
    head_key = family.disk_head.removesuffix(".") if own else ""
    files += writer.write(family.disk_layers, norm, read(head)[rows], read, head_key)
    stored["head"] = graph.stored.pop("head")
    stored["decoder"] = sum(graph.stored.values(), Stored())
    values = read(embeddings)[rows]
    table = write_table(folder, values, bits.embeddings, block)
    stored["embeddings"] = Stored(values.size, table["size_bytes"])
    stored["all"] = sum(stored.values(), Stored())
    facts = {
        "front_end": asdict(front_end) if front_end else None,
        "decoder": asdict(geometry),
        "trimmed": kept is not None,
        "bits": {**asdict(bits), "embeddings": table["bits"]},
        "bits_per_weight": {
            part: round(8 * each.size_bytes / each.parameters, 3) for part, each in stored.items()
        },
    }
    return facts, [*(path.name for path in files), *table["files"]]


def _front_end(processor: Any) -> LogMel:
    try:
        return LogMel.from_extractor(processor.feature_extractor)
    except (AttributeError, ValueError) as error:
        raise FamilyError(
            f"The audio front end cannot be written into an ONNX package ({error})",
            expected="a Whisper feature extractor",
            mend="package this model with --target checkpoint",
        ) from None
