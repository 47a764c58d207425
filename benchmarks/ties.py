"""Near ties: where two best tokens are so close that rounding decides between them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.workload import FloatArray
from export.parity import top_two_gap
from halve.translate import TorchTranslator


def differs_at_tie(
    translator: Any, audio: FloatArray, lang: str, tokens: Sequence[int], other: str, most: float
) -> bool:
    """Whether a text leaves a translation where the best two tokens were nearer than `most`.

    Args:
        translator: what made `tokens`, on torch or ONNX.
        tokens: the translation's tokens.
        other: the text that differs from theirs.
    """
    decode = translator.decode if isinstance(translator, TorchTranslator) else translator.text
    shared = shared_tokens([decode(tokens[:count]) for count in range(len(tokens) + 1)], other)
    # The other text's token may begin with the letters of ours: look one token back as well.
    return any(
        _gap(translator, audio, lang, tokens[:count]) < most
        for count in range(max(0, shared - 1), shared + 1)
    )


def shared_tokens(prefixes: Sequence[str], other: str) -> int:
    """How many tokens a text has in common with a translation.

    Args:
        prefixes: text of the translation's first 0, 1, 2, … tokens; half a character at the end of
            one is decoded as U+FFFD.
    """
    shared = 0
    for count, prefix in enumerate(prefixes):
        if not other.startswith(prefix.rstrip("�").rstrip()):
            break
        shared = count
    return shared


def _gap(translator: Any, audio: FloatArray, lang: str, tokens: Sequence[int]) -> float:
    if isinstance(translator, TorchTranslator):
        return top_two_gap(translator, audio, lang, tokens)
    return float(translator.top_two_gap(audio, lang, tokens))
