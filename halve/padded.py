"""A batch of prompts, padded at their left, on its way through a decoder on torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from halve.translate import Taken, TorchTranslator


class PaddedRows:
    """Rows that read their prompts together and then one token each a step.

    After a step rows may leave, change places or be continued more than once.
    """

    def __init__(
        self, translator: "TorchTranslator", sources: "Sequence[Taken]", lang: str
    ) -> None:
        """`sources`: as `encode_all` gives them."""
        speech = translator.speech
        self._decoder = speech.part(speech.family.decoder)
        self._family, self._model = speech.family, speech.model
        self._conditions = self._family.conditions(sources)
        self._cache = self._family.new_cache()
        self._sources = list(range(len(sources)))
        """Of each row."""
        self._pad([translator.inputs(source, lang) for source in sources])
        self._prompt = self._mask.shape[1]

    def _pad(self, prompts: "Sequence[torch.Tensor]") -> None:
        import torch

        longest = max(len(row) for row in prompts)
        self._inputs = prompts[0].new_zeros(len(prompts), longest, prompts[0].shape[1])
        self._mask = torch.zeros(
            len(prompts), longest, dtype=torch.long, device=self._inputs.device
        )
        for index, row in enumerate(prompts):
            self._inputs[index, longest - len(row) :] = row
            self._mask[index, longest - len(row) :] = 1
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)

    def read(self) -> "torch.Tensor":
        """Reads the prompts, or what `go_on` took; each row's last state, (rows, hidden)."""
        import torch

        with torch.inference_mode():
            states: torch.Tensor = self._decoder(
                **self._family.decoder_inputs(self._model, self._inputs),
                attention_mask=self._mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
                **self._conditions,
            ).last_hidden_state[:, -1]
        return states

    def go_on(self, places: Sequence[int], tokens: "torch.Tensor") -> None:
        """The rows of the next step: row i continues that at `places[i]` with `tokens[i]`."""
        import torch

        # On the processor: layers, and so their caches, may lie on several GPUs.
        rows = torch.tensor(places)
        if list(places) != list(range(len(self._mask))):
            self._move(places, rows)
        with torch.inference_mode():
            self._inputs = self._family.embed(self._model, tokens.to(self._mask.device))[:, None]
        self._positions = self._positions[rows, -1:] + 1
        mask = self._mask[rows]
        self._mask = torch.cat([mask, mask.new_ones(len(places), 1)], dim=1)

    def _move(self, places: Sequence[int], rows: "torch.Tensor") -> None:
        import torch
        from transformers import DynamicCache, DynamicLayer

        sources = [self._sources[place] for place in places]
        cache = self._cache
        plain = type(cache) is DynamicCache and all(
            type(layer) is DynamicLayer for layer in cache.layers
        )
        if plain and sources == self._sources:
            # Only what was said since the prompt differs between rows of one source.
            with torch.inference_mode():
                for layer in cache.layers:
                    for kept in (layer.keys, layer.values):
                        said = kept[:, :, self._prompt :]
                        said.copy_(said[rows])
            return
        self._sources = sources
        cache.batch_select_indices(rows)
        self._conditions = {name: value[rows] for name, value in self._conditions.items()}
