"""Beam search with a model on torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halve.beams import BeamSearch, FloatArray
from halve.padded import PaddedRows

if TYPE_CHECKING:
    import torch

    from halve.translate import Taken, TorchTranslator


def search(
    translator: "TorchTranslator",
    sources: "Sequence[Taken]",
    lang: str,
    searches: Sequence[BeamSearch],
) -> None:
    """Searches for several sources' translations in one batch, each source in a search of its own.

    Args:
        sources: as `encode_all` gives them.
        searches: keep what they find; one that is over leaves the batch.
    """
    import torch

    if not searches:
        return
    rows = PaddedRows(translator, sources, lang)
    at_work = [(one, slice(row, row + 1)) for row, one in enumerate(searches)]
    while at_work:
        first = at_work[0][0]
        scores, among = _likeliest(translator.all_logits(rows.read()), first)
        places: list[int] = []
        tokens: list[int] = []
        going_on = []
        for one, part in at_work:
            found = one.advance_among(scores[part], among[part])
            if found is None:
                continue
            going_on.append((one, slice(len(tokens), len(tokens) + len(found[0]))))
            tokens += found[0]
            places += [part.start + parent for parent in found[1]]
        at_work = going_on
        if at_work:
            rows.go_on(places, torch.tensor(tokens))


def _likeliest(logits: "torch.Tensor", one: BeamSearch) -> "tuple[FloatArray, NDArray[np.int64]]":
    """Log-probabilities and places of each row's likeliest tokens: large vocabularies stay where they are.

    Args:
        logits: (rows, vocabulary).
        one: any of the searches, which all are at the same token.
    """
    import torch

    with torch.inference_mode():
        scores = torch.log_softmax(logits.float(), dim=-1)
        # As in stock code, what is blocked keeps its share of the probability.
        scores[:, one.never()] = -float("inf")
        values, places = scores.topk(min(one.candidates, scores.shape[1]), dim=-1)
    return values.cpu().numpy(), places.cpu().numpy()
