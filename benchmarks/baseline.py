"""The stock baseline: transformers' own `generate` and the stock processor, nothing of halve's runtime.

This is what a user gets from the model card's example: the processor pads every clip to 30 s, the
encoder hears all of it, `generate` decodes one clip at a time in fp32.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from halve.audio import FloatArray
from halve.families import Family, family_for
from halve.languages import language
from halve.models import load_processor, read_config


@dataclass
class TokenClock(BaseStreamer):
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
    """A checkpoint in stock transformers, fp32."""

    def __init__(self, path: Path) -> None:
        self.family: Family = family_for(read_config(path))
        self.processor = load_processor(path)
        loader = getattr(transformers, self.family.auto_class)
        self.model = loader.from_pretrained(path, dtype=torch.float32)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def generate(self, audio: FloatArray, lang: str, limit: int) -> tuple[list[int], list[float]]:
        """Translates one clip greedily.

        Returns:
            the tokens with the one that ended them, and when each was there (perf_counter).
        """
        inputs = self.family.stock_inputs(
            self.processor, audio, self.family.instruction(language(lang)), torch.float32
        )
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        clock = TokenClock()
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, streamer=clock
            )
        return ids[0, inputs["input_ids"].shape[1] :].tolist(), clock.times_s

    def text(self, tokens: list[int]) -> str:
        """The text of tokens."""
        return self.family.decode_text(self.processor, tokens)


def can_load(path: Path) -> bool:
    """Whether stock transformers loads the directory in fp32: a checkpoint that is not quantised."""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        return False
    return read_config(path).get("quantization_config") is None
