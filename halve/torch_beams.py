"""Beam search with a model on torch."""

from typing import TYPE_CHECKING, Any

from halve.beams import BeamSearch, FloatArray, Hypothesis

if TYPE_CHECKING:
    import torch

    from halve.translate import Taken, TorchTranslator


def search(
    translator: "TorchTranslator", taken: "Taken", lang: str, beam_search: BeamSearch
) -> Hypothesis:
    """The best translation of one source that `encode_all` has taken in."""
    return beam_search.run(*_drive(translator, taken, lang))


def _drive(translator: "TorchTranslator", taken: "Taken", lang: str) -> Any:
    """The logits after the prompt, and what computes those after more tokens."""
    import torch

    speech = translator.speech
    family = speech.family
    decoder, device = speech.part(family.decoder), speech.part(family.embeddings).weight.device
    cache = family.new_cache()

    def forward(inputs: "torch.Tensor") -> FloatArray:
        rows = len(inputs)
        conditions = {
            name: value.expand(rows, *value.shape[1:])
            for name, value in family.conditions([taken]).items()
        }
        with torch.inference_mode():
            states = decoder(
                **family.decoder_inputs(speech.model, inputs),
                past_key_values=cache,
                use_cache=True,
                **conditions,
            ).last_hidden_state[:, -1]
            found: FloatArray = family.logits(speech.model, states).float().cpu().numpy()
        return found

    def step(tokens: list[int], parents: list[int]) -> FloatArray:
        with torch.inference_mode():
            # On the processor: layers, and so their caches, may lie on several GPUs.
            cache.batch_select_indices(torch.tensor(parents))
            inputs = family.embed(speech.model, torch.tensor(tokens, device=device))[:, None]
        return forward(inputs)

    return forward(translator.inputs(taken, lang)[None])[0], step
