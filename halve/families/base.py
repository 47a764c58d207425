"""What halve must know of a model family. Everything that names an architecture is in this folder."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from halve.audio import FloatArray
from halve.errors import FamilyError
from halve.families.masks import layer_masks
from halve.families.onnx_layout import unlike_onnx
from halve.languages import ENGLISH, Language

if TYPE_CHECKING:
    import torch

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
    """Of one decoder layer; their mean where they differ."""
    decoder_layers: int
    all_layers: int | None = None
    """Of all decoder layers, where they differ."""
    buffers: int = 0
    """Numbers that lie among the stored tensors and are no parameters."""

    @property
    def decoder(self) -> int:
        """Parameters of all decoder layers."""
        return self.per_layer * self.decoder_layers if self.all_layers is None else self.all_layers


@dataclass(frozen=True)
class GgufLayout:
    """How llama.cpp knows a decoder of transformers."""

    architecture: str
    neighbours: bool = False
    """Whether it rotates neighbouring channels, where transformers rotates a channel and that half a head on."""


@dataclass(frozen=True)
class SourceText:
    """What a text model is given: a sentence, and the language it is in."""

    text: str
    lang: str = "en"

    def __len__(self) -> int:
        """Characters: what batches are sorted by."""
        return len(self.text)


Source = FloatArray | SourceText
"""One segment as a model is given it: samples of shape (samples,), or a text."""


class Family(ABC):
    """One model family: where a checkpoint keeps its parts, in memory and on disk, and how it is asked.

    Paths in memory are dotted attributes of the model; prefixes on disk are of the keys in safetensors
    files. The two differ: never match one against the other.
    """

    name: str
    model_types: tuple[str, ...]
    refused: Mapping[str, str] = MappingProxyType({})
    """Model types that look like this family's and are not, and what to do instead."""
    auto_class: str
    """The transformers auto class that stock code loads the model with."""
    reads: Literal["audio", "text"] = "audio"
    """What the model translates: a text model needs no tower, projector or audio."""
    attends_to_encoder: bool = False
    """Whether decoder layers attend to the encoder's states; else these stand among the decoder's inputs."""
    hears_whole_window: bool = False
    """Whether the tower's states cover all of its 30 s, however short the clip is."""
    max_audio_s: float = 0.0
    """The longest audio that the model hears at once; 0 for one that reads."""
    onnx_layouts: frozenset[str] = frozenset()
    """Decoder model types whose layers are of the layout that ONNX packages know."""
    gguf_layouts: Mapping[str, GgufLayout] = MappingProxyType({})
    """The same for GGUF packages, each as llama.cpp knows it."""

    layers: str
    decoder: str
    embeddings: str
    norm: str
    head: str
    audio_tower: str = ""
    """Empty where there is none; likewise the projector."""
    projector: str = ""
    no_onnx: str = ""
    """Why neither an ONNX nor a GGUF package of this family can be written; empty where its graphs are known."""
    unquantised: tuple[str, ...] = ()
    """Further parts with linear layers that are none of the decoder layers'."""
    images: tuple[str, ...] = ()
    """Parts that see, which no training touches."""
    text_defaults: Mapping[str, Any] = MappingProxyType({})
    """What stock code takes for decoder settings that a config leaves out, as released ones do."""
    released: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    """Configs of models by their hub ids, the shapes alone: what a run costs is known before a download."""

    disk_layers: str
    """Prefix of a decoder layer's keys, before the layer's number."""
    disk_embeddings: str
    disk_head: str
    disk_audio_tower: str = ""
    disk_projector: str = ""

    def instruction(self, target: Language, source: Language = ENGLISH) -> str:
        """What the model is asked for, after the audio (Moslem 2025)."""
        return f"Translate the {source.name} speech into {target.name}:"

    def transcription(self, source: Language = ENGLISH) -> str:
        """What the model is asked for where it is to write down what it hears."""
        return f"Transcribe the {source.name} speech:"

    def load_processor(self, path: Path) -> Any:
        """The processor of a model directory: something with a `tokenizer`, for audio a `feature_extractor`."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(str(path), local_files_only=True)

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The decoder's part of a config, the stock class's defaults filled in."""
        return {**self.text_defaults, **config["text_config"]}

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """How many decoder layers a config has."""
        return int(self.text_config(config)["num_hidden_layers"])

    def check_kept(self, config: Mapping[str, Any], kept: Sequence[int]) -> list[int]:
        """The kept layers, sorted.

        Raises:
            FamilyError: numbers that the model does not have, twice the same, none, or without one
                that must stay.
        """
        total = self.num_layers(config)
        unique = sorted(set(kept))
        if not unique or unique[0] < 0 or unique[-1] >= total or len(unique) != len(kept):
            raise FamilyError(
                f"Layers {list(kept)} cannot be kept",
                expected=f"different numbers from 0 to {total - 1}, at least one",
            )
        stay = self.must_stay(config)
        gone = [f"layer {n} cannot go: {why}" for n, why in sorted(stay.items()) if n not in unique]
        if gone:
            raise FamilyError(
                "; ".join(gone),
                expected=f"layers {', '.join(map(str, sorted(stay)))} of this model kept",
                mend="remove others; `halve importance` proposes none of these",
            )
        return unique

    def has_onnx(self, config: Mapping[str, Any]) -> bool:
        """Whether a model of this config can become an ONNX package, as far as a config says."""
        return not self.unlike_onnx(config)

    def unlike_onnx(self, config: Mapping[str, Any]) -> str:
        """What of a config ONNX packages do not know, in words; nothing where they know it all."""
        return unlike_onnx(self.text_config(config), self.onnx_layouts)

    def must_stay(self, config: Mapping[str, Any]) -> Mapping[int, str]:
        """The layers that cannot be removed, and why."""
        return {}

    def some_kept(self, config: Mapping[str, Any], count: int) -> list[int]:
        """Some `count` layers that may be kept together, for estimates: those that must, then the first."""
        stay = set(self.must_stay(config))
        free = [layer for layer in range(self.num_layers(config)) if layer not in stay]
        return sorted([*stay, *free[: max(0, count - len(stay))]])

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

    def number_layer(self, layer: Any, index: int) -> None:
        """Tells a decoder layer in memory its place in the cache."""
        layer.self_attn.layer_idx = index

    def is_surplus(self, config: Mapping[str, Any], key: str) -> bool:
        """Whether stock code ignores this on-disk tensor: pruning leaves it behind.

        Here: rotary frequencies, which Llama 2's time stored and code computes.
        """
        return key.endswith("rotary_emb.inv_freq")

    def stacked_axis(self, key: str) -> int | None:
        """The dimension along which an on-disk tensor holds something of every decoder layer, side by side."""
        return None

    @contextmanager
    def sliced(self, model: Any, kept: Sequence[int]) -> Iterator[None]:
        """While open, the model fits its `kept` decoder layers (its own numbers); the layers are swapped by others.

        Here: the layer count and the list of layer types that stock code reads.
        """
        config = resolve(model, self.decoder).config
        before = {
            key: getattr(config, key)
            for key in ("num_hidden_layers", "layer_types")
            if getattr(config, key, None) is not None
        }
        try:
            config.num_hidden_layers = len(kept)
            if "layer_types" in before:
                config.layer_types = [before["layer_types"][layer] for layer in kept]
            yield
        finally:
            for key, value in before.items():
                setattr(config, key, value)

    def kept_generation(self, generation: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The generation_config.json after pruning: changed where it names decoder layers."""
        return generation

    @abstractmethod
    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Exact logical parameters from the config alone."""

    @abstractmethod
    def encode(self, model: Any, processor: Any, audio: Any) -> "torch.Tensor":
        """The audio tower's output for one clip, before the projector.

        Args:
            audio: 16 kHz mono float32, shape (samples,).

        Returns:
            shape (positions, width), on valid frames only: equal to the stock model's on the clip padded
            to its full window.
        """

    def project(self, model: Any, states: "torch.Tensor") -> "torch.Tensor":
        """Tower states (..., width), of any type and device, as decoder inputs (..., hidden)."""
        projector = resolve(model, self.projector)
        like = next(projector.parameters())
        projected: torch.Tensor = projector(states.to(like.device, like.dtype))
        return projected

    def take_in(self, model: Any, processor: Any, source: Source) -> "torch.Tensor | SourceText":
        """One segment as `embed_prompt` takes it: computed once, whatever language it is translated into."""
        return self.project(model, self.encode(model, processor, source))

    def embed_prompt(
        self, model: Any, processor: Any, instruction: str, taken: "torch.Tensor | SourceText"
    ) -> "torch.Tensor":
        """The decoder's inputs for one segment, up to the first token it says: (positions, hidden)."""
        import torch

        device = resolve(model, self.embeddings).weight.device
        before, after = (
            self.embed(model, torch.tensor(ids, dtype=torch.long, device=device))
            for ids in self.prompt_ids(processor, instruction)
        )
        assert isinstance(taken, torch.Tensor)
        return torch.cat([before, taken.to(before.device, before.dtype), after])

    def embed(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        """Tokens (...) as decoder inputs (..., width).

        The width is the hidden size, or more where the decoder takes more of a token than its embedding:
        `decoder_inputs` and `enter` take them apart again.
        """
        inputs: torch.Tensor = resolve(model, self.embeddings)(ids)
        return inputs

    def decoder_inputs(self, model: Any, inputs: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """Decoder inputs (rows, tokens, width) as the arguments of the stock decoder."""
        return {"inputs_embeds": inputs}

    def attention_masks(
        self, model: Any, mask: "torch.Tensor | None", positions: "torch.Tensor"
    ) -> Any:
        """A mask of who sees whom as the stock decoder takes it: one for each kind of layer it has.

        Stock code cuts a plain mask to a layer's window by itself, one with four dimensions it takes as it is.

        Args:
            mask: (rows, 1, tokens, tokens), bool.
            positions: (rows, tokens).
        """
        if mask is None:
            return None
        config = resolve(model, self.decoder).config
        return layer_masks(config, mask, positions, resolve(model, self.embeddings).weight.dtype)

    def conditions(self, taken: "Sequence[torch.Tensor | SourceText]") -> "dict[str, torch.Tensor]":
        """What the decoder is given beside a batch's inputs at every step, by argument; rows come first."""
        return {}

    def new_cache(self) -> Any:
        """An empty cache for the decoder."""
        from transformers import DynamicCache

        return DynamicCache()

    def logits(self, model: Any, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits (..., vocabulary) of the decoder's normed states (..., hidden)."""
        found: torch.Tensor = resolve(model, self.head)(hidden)
        return found

    def suppressed(self, model: Any) -> tuple[Sequence[int], Sequence[int]]:
        """Tokens that stock `generate` never says, and those that it does not begin with."""
        settings = model.generation_config
        # Where a package is made, its settings stand for the model.
        config = getattr(model, "config", None)
        vocabulary = config.get_text_config(decoder=True).vocab_size if config else math.inf
        always, at_first = (
            getattr(settings, name, None) or ()
            for name in ("suppress_tokens", "begin_suppress_tokens")
        )
        # As in stock code, an id beyond the vocabulary (or -1) forbids nothing.
        return (
            tuple(token for token in always if 0 <= token < vocabulary),
            tuple(token for token in at_first if 0 <= token < vocabulary),
        )

    def rotary(self, decoder: Any, hidden: "torch.Tensor", places: "torch.Tensor") -> Any:
        """What tells decoder layers the tokens' positions, or that for each kind of layer.

        Args:
            hidden: inputs of the first layer, (rows, tokens, hidden).
            places: position of each token, (rows, tokens).
        """
        return decoder.rotary_emb(hidden, places)

    def rotary_of(self, layer: Any, rotary: Any) -> Any:
        """The part of `rotary` that stock code hands this layer."""
        return rotary

    def enter(
        self, decoder: Any, inputs: "torch.Tensor", places: "torch.Tensor"
    ) -> "tuple[torch.Tensor, Any]":
        """Decoder inputs (tokens, width) as the first layer's states (tokens, hidden), and what goes along
        beside them through all layers.

        Args:
            places: position of each token, (tokens,).
        """
        return inputs, self.rotary(decoder, inputs[None], places[None])

    def layer_inputs(self, layer: Any, beside: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """What stock code hands this layer beside its states.

        Args:
            beside: as `enter` gave it.
            shared: a place where layers leave something for later ones, empty before the first.
        """
        return {"position_embeddings": self.rotary_of(layer, beside)}

    def cache_width(self, model: Any) -> int:
        """How many numbers a token leaves in the keys and values of all decoder layers."""
        layers = resolve(model, self.layers)
        config = layers[0].self_attn.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * int(config.num_key_value_heads) * int(dim) * len(layers)

    @abstractmethod
    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt before and after the audio's positions."""

    def prompt_template(self, processor: Any, instruction: str) -> tuple[str, str]:
        """A text family's prompt before and after the source text."""
        raise FamilyError(f"{self.name} models do not read texts", expected="audio")

    def source_ids(self, processor: Any, instruction: str, source: SourceText) -> list[int]:
        """A text family's prompt with a text in it, as token ids."""
        raise FamilyError(f"{self.name} models do not read texts", expected="audio")

    def check_stored(self, model: Path, keys: Iterable[str]) -> None:
        """Refuses weights whose decoder layers have other names than this family's.

        Raises:
            FamilyError: none begins as the family's layers do.
        """
        found = list(keys)
        if not any(key.startswith(self.disk_layers) for key in found):
            raise FamilyError(
                f"{model}: no stored tensor is called {self.disk_layers}…, but {', '.join(found[:2])}, …",
                expected=f"the names of {self.name} models as released",
                mend="load it with stock transformers, set model._weight_conversions = None, and save it with "
                "model.save_pretrained(DIR)",
            )

    def end_ids(self, model: Any) -> tuple[int, ...]:
        """Tokens that end a translation."""
        ends = model.generation_config.eos_token_id
        if ends is None:
            raise FamilyError(
                "The model's generation_config.json has no eos_token_id",
                expected="the token that ends a turn",
                mend='add it: "eos_token_id": N, as tokenizer_config.json names it (Qwen: 151645, <|im_end|>)',
            )
        return tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)

    def stock_inputs(
        self, processor: Any, audio: Any, instruction: str, dtype: "torch.dtype"
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

    def stock_generate(
        self, model: Any, inputs: dict[str, "torch.Tensor"], **options: Any
    ) -> list[int]:
        """What stock `generate` adds to `stock_inputs` of one segment, the end token included."""
        output = model.generate(**inputs, **options)
        tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    @abstractmethod
    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The whole prompt as text, with one placeholder for the audio."""

    def said(self, text: str) -> str:
        """A text as the model would write it."""
        return text

    def decode_text(self, processor: Any, ids: Sequence[int]) -> str:
        """The text of generated tokens."""
        text: str = processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()


def kept_slices(
    tensor: "torch.Tensor", axis: int, num_layers: int, kept: Sequence[int]
) -> "torch.Tensor":
    """The kept layers' part of a tensor that holds all layers side by side along `axis`."""
    apart = tensor.unflatten(axis, (num_layers, -1))
    chosen = apart[sorted(kept)] if axis == 0 else apart[:, sorted(kept)]
    return chosen.flatten(axis, axis + 1)


def resolve(model: Any, path: str) -> Any:
    """The part of a model at a dotted path."""
    for name in path.split("."):
        model = getattr(model, name)
    return model
