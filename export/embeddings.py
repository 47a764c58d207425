"""The token embedding table of a package: stored small, read row by row from disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.quantise import fits_bfloat16, from_bfloat16, quantise_blocks, to_bfloat16
from export.vocabulary import WHOLE, Vocabulary

FloatArray = NDArray[np.float32]

KEPT_BYTES = 4 << 20
"""Of rows looked up lately: decoding says the same few thousand tokens again and again."""
_FEW = 64
"""So many tokens are a step's; more are a prompt's, which is looked up once."""
TABLE = "embeddings.npy"
SCALES = "embedding_scales.npy"


def write_table(folder: Path, table: FloatArray, bits: int, block_size: int) -> dict[str, Any]:
    """Writes the table, (vocabulary, hidden), in 32, 8 or 4 bits.

    Eight bits are scaled a row, four bits a block of `block_size` within a row; in 32 bits, values that
    fit bfloat16 are stored so, which loses nothing.

    Returns:
        What a package records: bits, stored bytes and files.
    """
    if bits == 32:
        exact = fits_bfloat16(table)
        np.save(folder / TABLE, to_bfloat16(table) if exact else table, allow_pickle=False)
        return {
            "bits": 16 if exact else 32,
            "size_bytes": table.size * (2 if exact else 4),
            "files": [TABLE],
        }
    blocks = quantise_blocks(table, bits, table.shape[1] if bits == 8 else block_size)
    np.save(folder / TABLE, blocks.packed(), allow_pickle=False)
    np.save(folder / SCALES, blocks.scales, allow_pickle=False)
    return {"bits": bits, "size_bytes": blocks.size_bytes, "files": [TABLE, SCALES]}


@dataclass
class EmbeddingTable:
    """Looks tokens up in a table that `write_table` has written; its pages are read on demand."""

    folder: Path
    bits: int
    hidden: int
    vocabulary: Vocabulary = WHOLE
    """What its rows stand for."""

    def __post_init__(self) -> None:
        self._table = self._open(TABLE)
        self._scales = self._open(SCALES) if self.bits < 16 else None
        self._row = lru_cache(max(1, KEPT_BYTES // (4 * self.hidden)))(self._look_up_one)

    def _open(self, name: str) -> NDArray[Any]:
        return np.asarray(np.load(self.folder / name, mmap_mode="r", allow_pickle=False))

    def __call__(self, tokens: Sequence[int]) -> FloatArray:
        """Embeddings of the tokens, (tokens, hidden), which must not be written to.

        Raises:
            InputError: a token that a trimmed package has not kept.
        """
        if len(tokens) == 1:
            return self._row(tokens[0])
        if 0 < len(tokens) <= _FEW:
            return np.concatenate([self._row(token) for token in tokens])
        return self._look_up(tokens)

    def _look_up_one(self, token: int) -> FloatArray:
        row = self._look_up([token])
        row.flags.writeable = False  # it is handed out again
        return row

    def _look_up(self, tokens: Sequence[int]) -> FloatArray:
        places = self.vocabulary.rows(tokens)
        rows = self._table[places]
        if self._scales is None:
            return from_bfloat16(rows) if self.bits == 16 else np.asarray(rows, dtype=np.float32)
        if self.bits == 4:
            rows = np.stack([rows & 15, rows >> 4], axis=-1).reshape(*rows.shape[:2], -1)
        centred = rows.astype(np.float32) - 2 ** (self.bits - 1)
        values = centred * self._scales[places].astype(np.float32)[..., None]
        return np.ascontiguousarray(values.reshape(len(rows), -1)[:, : self.hidden])
