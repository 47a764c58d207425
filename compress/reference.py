"""The paper's own procedure, kept as the yardstick: one candidate, one segment, one token at a time.

Each candidate is a deep copy of the whole model without the layer; each segment goes through the stock
processor and stock `generate`, its audio padded and encoded again (Moslem 2025, arXiv 2505.20237).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from compress.footprint import Footprint
from compress.task import SearchTask
from halve.families import Family, resolve
from halve.models import SpeechModel
from halve.sources import asked
from halve.stock import generating, greedy_config


@contextmanager
def only_layers(model: Any, family: Family, kept: Sequence[int]) -> Iterator[Any]:
    """The model with only the `kept` decoder layers (its own numbers) while open; it is restored after.

    Renumbers what stock code reads: each layer's index into the cache, the layer count and the list of
    layer types.
    """
    path, _, name = family.layers.rpartition(".")
    parent, layers = resolve(model, path), resolve(model, family.layers)
    chosen = [layers[layer] for layer in kept]
    with family.sliced(model, kept):
        try:
            setattr(parent, name, type(layers)(chosen))
            for index, layer in enumerate(chosen):
                family.number_layer(layer, index)
            yield model
        finally:
            for index, layer in enumerate(layers):
                family.number_layer(layer, index)
            setattr(parent, name, layers)


class StockTranslator:
    """Translates one segment after the other with stock `generate` and the stock processor."""

    def __init__(self, speech: SpeechModel, task: SearchTask, *, deep_copy: bool = True) -> None:
        """`deep_copy` copies the model for each candidate, as the paper does; else layers step aside."""
        self.speech = speech
        self.task = task
        self._deep_copy = deep_copy

    def __enter__(self) -> "StockTranslator":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def footprint(self) -> Footprint:
        """Nothing is kept between segments."""
        return Footprint((0,) * len(self.task.ids))

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """One candidate after the other."""
        return [[candidate] for candidate in candidates]

    def run(
        self,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int | None]],
        rows: Sequence[int],
    ) -> Iterator[dict[int | None, list[list[int]]]]:
        """As `ExactTranslator.run`; the drafts are not looked at."""
        for group in candidates:
            found = {}
            for candidate in group:
                chosen = [layer for layer in kept if layer != candidate]
                model = copy.deepcopy(self.speech.model) if self._deep_copy else self.speech.model
                with only_layers(model, self.speech.family, chosen):
                    found[candidate] = [self.translate(model, row) for row in rows]
                del model  # before the next copy is made
            yield found

    def translate(self, model: Any, row: int) -> list[int]:
        """One segment's tokens, the end token included."""
        import torch

        speech, task = self.speech, self.task
        dtype = getattr(torch, speech.dtype)
        instruction = asked(speech.family, task.lang, task.audio[row])
        inputs = speech.family.stock_inputs(speech.processor, task.audio[row], instruction, dtype)
        inputs = {key: value.to(speech.device) for key, value in inputs.items()}
        settings = greedy_config(speech.family, model, task.limits[row])
        with torch.inference_mode(), generating(model, settings):
            return speech.family.stock_generate(model, inputs)
