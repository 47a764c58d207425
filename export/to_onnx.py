"""Writes a student's parts as ONNX graphs, straight from its safetensors files.

Three parts: audio encoder with projector, token embedding table, decoder with key-value cache. The
tensors are read one at a time, so that memory does not grow with the model.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.decoder_graph import DecoderWriter, check_layer, geometry_of
from export.embeddings import write_table
from export.encoder_graph import write_encoder
from export.frontend import LogMel
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
) -> tuple[dict[str, Any], list[str]]:
    """Writes all parts of an ONNX package but its tokenizer.

    Args:
        kept: ascending ids of the tokens to keep; all where None.

    Returns:
        The facts that package.json records for the runtime, and the names of the files.

    Raises:
        FamilyError: the model has a part that cannot be written.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(student), local_files_only=True)
    read = TensorReader(student)
    front_end = _front_end(processor)
    geometry = geometry_of(config.get_text_config())
    rows: Any = slice(None)
    if kept is not None:
        rows, geometry = kept, replace(geometry, vocabulary=len(kept))
        np.save(folder / VOCABULARY, kept.astype(np.int32), allow_pickle=False)
    biased = check_layer(read.suffixes(f"{family.disk_layers}0."))
    block = bits.block_size
    files = write_encoder(
        folder,
        config.audio_config,
        family.disk_audio_tower,
        family.disk_projector,
        read,
        bits.encoder,
        block,
    )
    writer = DecoderWriter(folder, geometry, biased, bits.decoder, bits.head, block)
    norm = family.disk_layers.removesuffix("layers.") + "norm.weight"
    files += writer.write(family.disk_layers, norm, read(f"{family.disk_head}weight")[rows], read)
    table = write_table(
        folder, read(f"{family.disk_embeddings}weight")[rows], bits.embeddings, block
    )
    facts = {
        "front_end": asdict(front_end),
        "decoder": asdict(geometry),
        "trimmed": kept is not None,
        "bits": {**asdict(bits), "embeddings": table["bits"]},
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
