"""The stock baselines: transformers' own `generate` and the stock processor, nothing of halve's runtime.

This is what a user gets from the model card's example: the processor pads every clip to 30 s, the
encoder hears all of it, `generate` decodes one clip at a time. In fp32, bf16, or with the decoder
in bitsandbytes' NF4.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from halve.audio import FloatArray
from halve.families import Family, family_for, resolve
from halve.languages import language
from halve.models import load_processor, quantization_config, read_config
from halve.stock import generating, greedy_config

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}


@dataclass
class TokenClock(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands over each token."""

    times_s: list[float] = field(default_factory=list)
    _prompt_seen: bool = False

    def put(self, value: Any) -> None:
        """Called with the prompt first, then with each token."""
        if self._prompt_seen:
            self.times_s.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Called when the text is complete."""


class StockModel:
    """A checkpoint in stock transformers."""

    def __init__(self, path: Path, precision: str = "fp32", *, cut_audio: bool = False) -> None:
        """Loads a checkpoint that is stored unquantised.

        Args:
            precision: fp32, bf16 or nf4.
            cut_audio: encodes a clip's valid frames only, as halve does, and hands `generate` the
                decoder's inputs; else the stock processor pads it to the model's full window.
        """
        self.family: Family = family_for(read_config(path))
        self.processor = load_processor(path)
        self._dtype, self._cut_audio = _DTYPES[precision], cut_audio
        options: dict[str, Any] = {"dtype": self._dtype}
        if precision == "nf4":
            options["quantization_config"] = quantization_config(self.family, "nf4")
        loader = getattr(transformers, self.family.auto_class)
        self.model = loader.from_pretrained(path, **options)
        if precision != "nf4":
            self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.model.eval()

    def generate(
        self, audio: FloatArray, lang: str, limit: int, *, exactly: bool = False
    ) -> tuple[list[int], list[float]]:
        """Translates one clip greedily.

        Args:
            exactly: goes on past every end token until `limit` tokens are said.

        Returns:
            the tokens with the one that ended them, and when each was there (perf_counter).
        """
        clock = TokenClock()
        instruction = self.family.instruction(language(lang))
        at_least = limit if exactly else None
        settings = greedy_config(self.family, self.model, limit, at_least)
        options = {"streamer": clock}
        with torch.inference_mode(), generating(self.model, settings):
            if self._cut_audio:
                tokens = self._generate_cut(audio, instruction, options)
            else:
                inputs = self.family.stock_inputs(self.processor, audio, instruction, self._dtype)
                inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
                tokens = self.family.stock_generate(self.model, inputs, **options)
        return tokens, clock.times_s

    def _generate_cut(
        self, audio: FloatArray, instruction: str, options: dict[str, Any]
    ) -> list[int]:
        family = self.family
        taken = family.take_in(self.model, self.processor, audio)
        inputs = family.embed_prompt(self.model, self.processor, instruction, taken)[None]
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        given = family.decoder_inputs(self.model, inputs)
        said = self.model.generate(**given, attention_mask=mask, **options)
        tokens: list[int] = said[0].tolist()
        return tokens

    def text(self, tokens: list[int]) -> str:
        """The text of tokens."""
        return self.family.decode_text(self.processor, tokens)

    def weight_bytes(self) -> int:
        """Bytes of weights that decoding a token reads: all of the decoder and its head."""
        return decoder_weight_bytes(self.model, self.family)


def decoder_weight_bytes(model: Any, family: Family) -> int:
    """Bytes that a model on torch reads for a token: decoder and head, quantisation's scales included."""
    parts = [resolve(model, path) for path in (family.layers, family.norm, family.head)]
    return sum(
        tensor.nbytes
        for part in parts
        for parameter in part.parameters()
        for tensor in (parameter.data, *_scales(getattr(parameter, "quant_state", None)))
    )


def _scales(state: Any) -> list[torch.Tensor]:
    """Block scales of a bitsandbytes weight; with double quantisation these have scales of their own."""
    if state is None:
        return []
    return [state.absmax, *_scales(getattr(state, "state2", None))]


def can_load(path: Path) -> bool:
    """Whether stock transformers loads the directory in fp32: a checkpoint that is not quantised."""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        return False
    return read_config(path).get("quantization_config") is None
