"""The GGUF file of a package: its name, and what halve itself reads from it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.vocabulary import WHOLE, Vocabulary

FloatArray = NDArray[np.float32]

GGUF = "decoder.gguf"
TABLE = "token_embd.weight"
HEAD = "output.weight"
"""Missing where the head is tied to the table."""
BLOCK_SIZE = 32
"""Weights that share a scale in GGUF's 8-bit and 4-bit types."""


class GgufTable:
    """Looks tokens up in the embedding table of a GGUF file; its pages are read on demand."""

    def __init__(self, path: Path, vocabulary: Vocabulary = WHOLE) -> None:
        """`vocabulary`: what its rows stand for."""
        from gguf import GGMLQuantizationType, GGUFReader

        tensor = next(each for each in GGUFReader(path).tensors if each.name == TABLE)
        self._rows, self._kind = tensor.data, GGMLQuantizationType(tensor.tensor_type)
        self._vocabulary = vocabulary

    def __call__(self, tokens: Sequence[int]) -> FloatArray:
        """Embeddings of the tokens, (tokens, hidden).

        Raises:
            InputError: a token that a trimmed package has not kept.
        """
        from gguf.quants import dequantize

        places = self._vocabulary.rows(tokens)
        values: FloatArray = dequantize(np.ascontiguousarray(self._rows[places]), self._kind)
        return values


def decoder_bytes(path: Path) -> int:
    """Bytes of weights that decoding a token reads: all, but an embedding table beside a head."""
    from gguf import GGUFReader

    sizes_bytes = {each.name: int(each.n_bytes) for each in GGUFReader(path).tensors}
    if HEAD in sizes_bytes:
        del sizes_bytes[TABLE]
    return sum(sizes_bytes.values())
