"""Which tokens a package keeps when its vocabulary is trimmed to the languages it translates into.

A token that is kept has the same embedding and the same logit as before: a trimmed package says the
same tokens for as long as its student would say kept ones. The tokenizer stays whole.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARY = "vocabulary.npy"

TokenIds = NDArray[np.int64]


def kept_tokens(tokenizer: Any, texts: Iterable[str], needed: Iterable[int], size: int) -> TokenIds:
    """The token ids to keep, ascending.

    Args:
        tokenizer: a tokenizers.Tokenizer.
        texts: what the package should be able to say; every token of them is kept, and so is every
            token of one byte or character, with which any text can be spelled.
        needed: tokens of prompts and ends.
        size: rows of the model's embedding table; ids beyond it are left out.
    """
    kept = set(needed)
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        kept.update(encoding.ids)
    kept.update(id_ for token, id_ in tokenizer.get_vocab().items() if _is_unit(token))
    return np.array(sorted(id_ for id_ in kept if id_ < size), dtype=np.int64)


def _is_unit(token: str) -> bool:
    """Whether a token is one character, which in byte-level vocabularies is one byte, or "<0x0A>"."""
    return len(token) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))
