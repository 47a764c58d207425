"""Beam search with a model on torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from halve.beams import BeamSearch
from halve.padded import PaddedRows

if TYPE_CHECKING:
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

    rows = PaddedRows(translator, sources, lang)
    at_work = [(one, slice(row, row + 1)) for row, one in enumerate(searches)]
    while at_work:
        states = rows.read()
        logits = translator.all_logits(states).float().cpu().numpy()
        places: list[int] = []
        tokens: list[int] = []
        going_on = []
        for one, part in at_work:
            found = one.advance(logits[part])
            if found is None:
                continue
            going_on.append((one, slice(len(tokens), len(tokens) + len(found[0]))))
            tokens += found[0]
            places += [part.start + parent for parent in found[1]]
        at_work = going_on
        if at_work:
            rows.go_on(places, torch.tensor(tokens))
