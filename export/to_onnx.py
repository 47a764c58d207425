"""Writes a student's parts as ONNX graphs, straight from its safetensors files.

Three parts: audio encoder with projector, token embedding table, decoder with key-value cache. The
tensors are read one at a time, so that memory does not grow with the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.cache_scales import Peaks, scales_of
from export.calibrate import Quantiser
from export.decoder_graph import DecoderWriter, check_layer, geometry_of
from export.embeddings import write_table
from export.encoder_graph import write_encoder
from export.frontend import LogMel
from export.geometry import Geometry
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
    cache: int = 32
    """Of a key or value in the decoder's cache; 32 is the type that is computed in."""


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
        """What follows `prefix` in the keys that begin with it; rotary frequencies, which code computes, are left out."""
        keys = (key for key in self._index if not key.endswith("rotary_emb.inv_freq"))
        return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}


def write_onnx(
    folder: Path,
    student: Path,
    family: Family,
    processor: Any,
    bits: Bits,
    kept: TokenIds | None = None,
    quantise: Quantiser | None = None,
    cache_peaks: Callable[[], Sequence[Peaks]] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Writes all parts of an ONNX package but its tokenizer.

    Args:
        quantise: how linear layers' weights become codes; by the weights alone where None.
        cache_peaks: asked, once the encoder is written, for each layer's peaks where keys and values are kept in 8 bits.
        kept: ascending ids of the tokens to keep; all where None.

    Returns:
        The facts that package.json records for the runtime, and the names of the files.

    Raises:
        FamilyError: the model has a part that cannot be written.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(student), local_files_only=True)
    read = TensorReader(student)
    geometry, rows = sizes(folder, config, kept)
    biased = check_layer(read.suffixes(f"{family.disk_layers}0."))
    block = bits.block_size
    front_end, files, stored = write_listening(
        folder, config, family, processor, read, bits, quantise
    )
    graph = GraphWriter(folder, "decoder", quantise, bits.half)
    caches = scales_of(cache_peaks(), geometry) if cache_peaks else None
    writer = DecoderWriter(graph, geometry, biased, bits.decoder, bits.head, block, caches)
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
    # A tied table is stored twice, and is one table of the model.
    counted = stored if own else stored | {"head": Stored(0, stored["head"].size_bytes)}
    stored["all"] = sum(counted.values(), Stored())
    facts = {
        "front_end": front_end,
        "decoder": asdict(geometry),
        "trimmed": kept is not None,
        "bits": {**asdict(bits), "embeddings": table["bits"]},
        "bits_per_weight": bits_per_weight(stored),
    }
    return facts, [*(path.name for path in files), *table["files"]]


def sizes(folder: Path, config: Any, kept: TokenIds | None) -> tuple[Geometry, Any]:
    """A decoder's geometry and the rows of its tables that a package keeps, which are noted in `folder`."""
    geometry = geometry_of(config.get_text_config())
    if kept is None:
        return geometry, slice(None)
    np.save(folder / VOCABULARY, kept.astype(np.int32), allow_pickle=False)
    return replace(geometry, vocabulary=len(kept)), kept


def write_listening(
    folder: Path,
    config: Any,
    family: Family,
    processor: Any,
    read: TensorReader,
    bits: Bits,
    quantise: Quantiser | None = None,
) -> tuple[dict[str, Any] | None, list[Path], dict[str, Stored]]:
    """Writes the audio encoder with its projector; nothing for a model that reads.

    Returns:
        The front end's parameters, the files, and what the weights take under the name "encoder".

    Raises:
        FamilyError: the encoder or the front end is of a layout that cannot be written.
    """
    if family.no_onnx:
        raise FamilyError(
            f"{family.name} models cannot be written as ONNX: {family.no_onnx}",
            mend="package this model with --target checkpoint",
        )
    if family.reads != "audio":
        return None, [], {}
    front_end = asdict(_front_end(processor))
    graph = GraphWriter(folder, "encoder", quantise, bits.half)
    tower, projector = family.disk_audio_tower, family.disk_projector
    files = write_encoder(
        graph, config.audio_config, tower, projector, read, bits.encoder, bits.block_size
    )
    return front_end, files, {"encoder": sum(graph.stored.values(), Stored())}


def bits_per_weight(stored: dict[str, Stored]) -> dict[str, float]:
    """Stored bits a weight of each part, with scales."""
    return {part: round(8 * each.size_bytes / each.parameters, 3) for part, each in stored.items()}


def _front_end(processor: Any) -> LogMel:
    try:
        return LogMel.from_extractor(processor.feature_extractor)
    except (AttributeError, ValueError) as error:
        raise FamilyError(
            f"The audio front end cannot be written into an ONNX package ({error})",
            expected="a Whisper feature extractor",
            mend="package this model with --target checkpoint",
        ) from None
