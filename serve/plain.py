"""The yardstick: stock transformers, one request at a time, audio padded as stock code pads it."""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from halve import environment
from halve.families import Source
from halve.languages import LANGUAGES
from halve.sources import asked, limits_for
from halve.stock import generating, greedy_config
from halve.translate import Translation

if TYPE_CHECKING:
    from halve.models import SpeechModel


class PlainTranslator:
    """A Translator (see `halve.translate`) that calls the stock processor and stock generate."""

    sample_rate_hz = 16_000

    def __init__(self, speech: "SpeechModel") -> None:
        self._speech = speech
        self._ends = frozenset(speech.family.end_ids(speech.model))
        self.family = speech.family.name
        self.languages = tuple(LANGUAGES)
        self.max_audio_s = speech.family.max_audio_s

    def translate(
        self,
        audio: Sequence[Source],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
        beams: int = 1,
    ) -> list[Translation]:
        """Translates clips one by one, whatever the batch size; greedily, as the paper."""
        chosen = limits_for(audio, limits)
        return [self._one(clip, lang, limit) for clip, limit in zip(audio, chosen, strict=True)]

    def _one(self, clip: Source, lang: str, limit: int) -> Translation:
        import torch

        speech = self._speech
        instruction = asked(speech.family, lang, clip)
        dtype = next(speech.model.parameters()).dtype
        inputs = speech.family.stock_inputs(speech.processor, clip, instruction, dtype)
        inputs = {key: value.to(speech.model.device) for key, value in inputs.items()}
        settings = greedy_config(speech.family, speech.model, limit)
        with torch.inference_mode(), generating(speech.model, settings):
            tokens = speech.family.stock_generate(speech.model, inputs)
        ended = bool(tokens) and tokens[-1] in self._ends
        tokens = tokens[:-1] if ended else tokens
        text = speech.family.decode_text(speech.processor, tokens)
        return Translation(text, tokens, "end" if ended else "limit")

    def stream(
        self, audio: Source, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        """Everything at the end: stock code as it is."""
        found = self.translate([audio], lang, limits=None if limit is None else [limit])[0]
        if found.text:
            yield found.text
        return found

    def close(self) -> None:
        """Frees the model."""
        del self._speech


def open_plain(path: str, *, threads: int | None = None, device: str = "auto") -> PlainTranslator:
    """Opens a model directory or hub id for the yardstick.

    Raises:
        ArtefactError: not a model that transformers loads.
    """
    from halve.arithmetic import roomy_dtype
    from halve.models import load_model

    if threads:
        environment.pin_threads(threads)
    # In float32, as stock code is served, where the weights have room for it.
    return PlainTranslator(load_model(path, dtype=roomy_dtype(path, device), device=device))
