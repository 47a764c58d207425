"""Which tokens a package keeps when its vocabulary is trimmed to the languages it translates into.

A token that is kept has the same embedding and the same logit as before: a trimmed package says the
same tokens for as long as its student would say kept ones. The tokenizer stays whole.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halve.errors import InputError

VOCABULARY = "vocabulary.npy"

TokenIds = NDArray[np.int64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the rows of a package's tables and its logits stand for, and which of them are never chosen."""

    kept: TokenIds | None = None
    """Token id of each row, ascending; the row's number where None."""
    suppressed: Sequence[int] = ()
    """Ids of tokens that stock `generate` never says."""
    suppressed_first: Sequence[int] = ()
    """Ids of tokens that it does not begin with."""

    def rows(self, tokens: Sequence[int]) -> Rows:
        """The row of each token, (tokens,).

        Raises:
            InputError: a trimmed package has not kept one of them.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if self.kept is None:
            return ids
        rows, there = self._find(ids)
        if not there.all():
            raise InputError(
                f"This package's vocabulary is trimmed, and token {ids[~there][0]} is not in it",
                expected=f"one of the {len(self.kept)} tokens that it has kept",
                mend="make the package again without --trim-vocab",
            )
        return rows

    def tokens(self, rows: Rows) -> list[int]:
        """The token id of each row."""
        found: list[int] = (rows if self.kept is None else self.kept[rows]).tolist()
        return found

    @cached_property
    def blocked(self) -> tuple[list[int], list[int]]:
        """Rows that are never chosen, and those that are not chosen first."""
        return self._present(self.suppressed), self._present(self.suppressed_first)

    def _present(self, tokens: Sequence[int]) -> list[int]:
        """The rows of those tokens that there are."""
        ids = np.asarray(tokens, dtype=np.int64)
        rows, there = (ids, slice(None)) if self.kept is None else self._find(ids)
        found: list[int] = rows[there].tolist()
        return found

    def _find(self, ids: TokenIds) -> tuple[Rows, NDArray[np.bool_]]:
        """The row of each id, and whether it is the id's own: that of another token if it was not kept."""
        assert self.kept is not None
        rows = np.minimum(np.searchsorted(self.kept, ids), len(self.kept) - 1)
        return rows, self.kept[rows] == ids


WHOLE = Vocabulary()
"""Nothing trimmed, nothing suppressed."""


def encoded(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """The token ids of each text; one that is there twice comes once."""
    unlike = list(dict.fromkeys(texts))
    return [each.ids for each in tokenizer.encode_batch(unlike, add_special_tokens=False)]


def kept_tokens(
    tokenizer: Any, texts: Iterable[Sequence[int]], needed: Iterable[int], size: int
) -> TokenIds:
    """The token ids to keep, ascending.

    Args:
        tokenizer: a tokenizers.Tokenizer.
        texts: what the package should be able to say, `encoded`; every token of them is kept, and so is every
            token of one byte or character, with which any text can be spelled.
        needed: tokens of prompts and ends.
        size: rows of the model's embedding table; ids beyond it are left out.
    """
    kept = set(needed)
    for ids in texts:
        kept.update(ids)
    kept.update(id_ for token, id_ in tokenizer.get_vocab().items() if _is_unit(token))
    return np.array(sorted(id_ for id_ in kept if id_ < size), dtype=np.int64)


def unseen_share(texts: Iterable[Sequence[int]]) -> float:
    """Estimates which share of a new text's tokens is in none of these texts, 0 to 1.

    Good and Turing's estimate (Good 1953): the share of tokens that one text alone has, of texts `encoded`. Tokens that are kept for another reason count as well, and of several languages it is the mean over all their
    tokens: an estimate for texts of the kind and the mixture given.
    """
    texts_with: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for ids in texts:
        texts_with.update(set(ids))
        tokens.update(ids)
    once = sum(count for id_, count in tokens.items() if texts_with[id_] == 1)
    return once / tokens.total() if tokens else 1.0


def _is_unit(token: str) -> bool:
    """Whether a token is one character, which in byte-level vocabularies is one byte, or "<0x0A>"."""
    return len(token) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))
