"""What halve must know of a model family. Everything that names an architecture is in this folder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halve.audio import FloatArray
from halve.errors import FamilyError
from halve.languages import Language

if TYPE_CHECKING:
    import torch

TRANSCRIBE = "Transcribe the English speech:"
SYSTEM_PROMPT = "You are a professional translator."


@dataclass(frozen=True)
class Counts:
    """Logical parameters of a model, from its config alone."""

    total: int
    audio_tower: int
    projector: int
    embeddings: int
    head: int
    per_layer: int
    decoder_layers: int

    @property
    def decoder(self) -> int:
        """Parameters of all decoder layers."""
        return self.per_layer * self.decoder_layers


class Family(ABC):
    """One model family: where a checkpoint keeps its parts, in memory and on disk, and how it is asked.

    Paths in memory are dotted attributes of the model; prefixes on disk are of the keys in safetensors
    files. The two differ: never match one against the other.
    """

    name: str
    model_types: tuple[str, ...]
    auto_class: str
    """The transformers auto class that stock code loads the model with."""
    max_audio_s: float
    """The longest audio that the model hears at once."""

    layers: str
    decoder: str
    embeddings: str
    norm: str
    head: str
    audio_tower: str
    projector: str

    disk_layers: str
    """Prefix of a decoder layer's keys, before the layer's number."""
    disk_embeddings: str
    disk_head: str
    disk_audio_tower: str
    disk_projector: str

    def instruction(self, target: Language) -> str:
        """What the model is asked for, after the audio (Moslem 2025)."""
        return f"Translate the English speech into {target.name}:"

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The decoder's part of a config."""
        part: Mapping[str, Any] = config["text_config"]
        return part

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """How many decoder layers a config has."""
        return int(self.text_config(config)["num_hidden_layers"])

    def check_kept(self, config: Mapping[str, Any], kept: Sequence[int]) -> list[int]:
        """The kept layers, sorted.

        Raises:
            FamilyError: numbers that the model does not have, twice the same, or none.
        """
        total = self.num_layers(config)
        unique = sorted(set(kept))
        if not unique or unique[0] < 0 or unique[-1] >= total or len(unique) != len(kept):
            raise FamilyError(
                f"Layers {list(kept)} cannot be kept",
                expected=f"different numbers from 0 to {total - 1}, at least one",
            )
        return unique

    @abstractmethod
    def kept_config(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config of the model with only the `kept` decoder layers (teacher's numbers, from 0)."""

    def kept_key(self, key: str, kept: Sequence[int]) -> str | None:
        """The name of an on-disk tensor after pruning; None if it goes."""
        if not key.startswith(self.disk_layers):
            return key
        number, _, rest = key[len(self.disk_layers) :].partition(".")
        if int(number) not in kept:
            return None
        return f"{self.disk_layers}{sorted(kept).index(int(number))}.{rest}"

    @abstractmethod
    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Exact logical parameters from the config alone."""

    @abstractmethod
    def encode(self, model: Any, processor: Any, audio: FloatArray) -> "torch.Tensor":
        """The audio tower's output for one clip, before the projector.

        Args:
            audio: 16 kHz mono float32, shape (samples,).

        Returns:
            shape (positions, width), on valid frames only: equal to the stock model's on the clip padded
            to its full window.
        """

    def project(self, model: Any, states: "torch.Tensor") -> "torch.Tensor":
        """Tower states (..., width) as decoder inputs (..., hidden)."""
        projected: torch.Tensor = resolve(model, self.projector)(states)
        return projected

    @abstractmethod
    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before and after the audio's positions."""

    def end_ids(self, model: Any) -> tuple[int, ...]:
        """Tokens that end a translation."""
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise FamilyError("The model's generation_config.json has no eos_token_id")
        return tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)

    def stock_inputs(
        self, processor: Any, audio: FloatArray, instruction: str, dtype: "torch.dtype"
    ) -> dict[str, "torch.Tensor"]:
        """What stock `generate` takes for one clip: made by the stock processor, as the paper does."""
        inputs = processor(
            text=self.prompt_text(processor, instruction),
            audio=audio,
            sampling_rate=processor.feature_extractor.sampling_rate,
            return_tensors="pt",
        )
        return {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in inputs.items()
        }

    @abstractmethod
    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The whole prompt as text, with one placeholder for the audio."""

    def decode_text(self, processor: Any, ids: Sequence[int]) -> str:
        """The text of generated tokens."""
        text: str = processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()


def resolve(model: Any, path: str) -> Any:
    """The part of a model at a dotted path."""
    for name in path.split("."):
        model = getattr(model, name)
    return model
