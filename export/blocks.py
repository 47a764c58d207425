"""How many weights share a scale, and what that asks of a decoder's rows.

Large blocks are faster: fewer scales are multiplied with. But in blocks of more than 32 weights of 4 bits, or 64
of 8, onnxruntime's kernel for one row adds up in another order than its kernel for several (CPU, 1.32). The
difference is of the last bit; rounding activations to 8 bits makes it one that changes tokens. So such a
decoder takes its rows one by one (`export.decoding`), which costs a crowd of rows up to half of its speed. Without
AVX-512 smaller blocks have two kernels as well: there an idle row keeps a lone one company (docs/decisions/0005).
"""

from collections.abc import Iterable, Mapping
from typing import Any

SMALL_BYTES = 64 << 20
"""Weights of a decoder and its head that a processor's cache holds, or nearly: rows do not share their reading."""
SMALL_BLOCK, LARGE_BLOCK = 32, 128

TILE_ROWS = 128
"""Rows of a quantised product that onnxruntime gives a thread at once, where it has several."""

_TOGETHER = {4: 32, 8: 64}
"""The largest block by bits whose rows are computed alike alone and among others."""


def choose_block(weight_bytes: float, widths: Iterable[int]) -> int:
    """The block where none is asked for.

    Args:
        weight_bytes: what a step reads: decoder and head, quantised.
        widths: inputs of the linear layers; a block that does not divide them all would be padded.
    """
    fits = all(width % LARGE_BLOCK == 0 for width in widths)
    return LARGE_BLOCK if fits and weight_bytes <= SMALL_BYTES else SMALL_BLOCK


def leaves_one(rows: int) -> bool:
    """Whether several threads would compute a row of so many by itself, with the kernel for lone rows, where one thread does not.

    So that bits do not depend on the number of threads, such products are computed otherwise.
    """
    return rows > 1 and rows % TILE_ROWS == 1


def rows_alone(bits: Mapping[str, Any]) -> bool:
    """Whether a decoder's rows must be computed one by one.

    Args:
        bits: what a package records under that name: decoder, head and block_size.
    """
    block = int(bits.get("block_size", SMALL_BLOCK))
    return any(block > _TOGETHER.get(int(bits[part]), block) for part in ("decoder", "head"))
