"""Whisper: an encoder of 30 s of audio, and a decoder whose every layer attends to its states.

What it is asked for stands in tokens: the language that it is to write, and the task. Whisper was taught to
transcribe, and to translate into English. For another target language the prompt names that language and
the task of transcription, which a fine-tuned model takes as "write this in German"; an untuned one does so
now and then.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from halve.audio import FloatArray
from halve.errors import FamilyError
from halve.families.base import Counts, Family, SourceText
from halve.families.qwen2_audio import count_tower
from halve.languages import ENGLISH, Language

if TYPE_CHECKING:
    import torch


class Whisper(Family):
    """Whisper, Distil-Whisper and models of their class (transformers: WhisperForConditionalGeneration)."""

    name = "whisper"
    model_types = ("whisper",)
    auto_class = "AutoModelForSpeechSeq2Seq"
    attends_to_encoder = True
    no_onnx = "its decoder layers attend to an encoder, which the graph that halve writes has no place for"
    hears_whole_window = True
    max_audio_s = 30.0

    layers = "model.decoder.layers"
    decoder = "model.decoder"
    embeddings = "model.decoder.embed_tokens"
    norm = "model.decoder.layer_norm"
    head = "proj_out"
    audio_tower = "model.encoder"

    disk_layers = "model.decoder.layers."
    disk_embeddings = "model.decoder.embed_tokens."
    disk_head = "proj_out."
    disk_audio_tower = "model.encoder."

    def instruction(self, target: Language, source: Language = ENGLISH) -> str:
        """The prompt in tokens: into English the task is translation, else transcription as `target`."""
        if target == ENGLISH and source != ENGLISH:
            return _prompt(source, "translate")
        return _prompt(target, "transcribe")

    def transcription(self, source: Language = ENGLISH) -> str:
        """The prompt to write down what is said."""
        return _prompt(source, "transcribe")

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The whole config: encoder and decoder share it."""
        return config

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """The decoder's layers; `num_hidden_layers` of this config are the encoder's."""
        return int(config["decoder_layers"])

    def kept_config(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config after pruning."""
        new = copy.deepcopy(dict(config))
        new["decoder_layers"] = len(self.check_kept(config, kept))
        return new

    def kept_generation(self, generation: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """Renumbers the heads that stock code takes word timestamps from, and drops those that went."""
        heads = generation.get("alignment_heads")
        if not heads:
            return generation
        places = {layer: place for place, layer in enumerate(sorted(kept))}
        left = [[places[layer], head] for layer, head in heads if layer in places]
        rest = {key: value for key, value in generation.items() if key != "alignment_heads"}
        return {**rest, "alignment_heads": left} if left else rest

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Counted from the shapes in the config; the head is the embeddings' table."""
        width, ffn = config["d_model"], config["decoder_ffn_dim"]
        # Keys have no bias; there are two attentions and three norms.
        attention = 4 * width * width + 3 * width
        layer = 2 * attention + 2 * width * ffn + ffn + width + 3 * 2 * width
        layers = self.num_layers(config)
        table = config["vocab_size"] * width
        tower = count_tower(config)
        positions = config.get("max_target_positions", 448) * width
        total = tower + table + positions + layers * layer + 2 * width
        return Counts(total, tower, 0, table, 0, layer, layers)

    def encode(self, model: Any, processor: Any, audio: FloatArray) -> "torch.Tensor":
        """The encoder's states of one clip: (1500, width).

        The whole window is encoded: silence is not masked, the decoder attends to it, and it was trained
        so. Cutting it changes what the model says.
        """
        import torch

        encoder = model.model.encoder
        weight = encoder.conv1.weight
        features = _features(processor, audio)
        states: torch.Tensor = encoder(features.to(weight.device, weight.dtype)).last_hidden_state
        return states[0]

    def project(self, model: Any, states: "torch.Tensor") -> "torch.Tensor":
        """The states as the decoder attends to them: there is no projector."""
        weight = model.model.decoder.embed_tokens.weight
        return states.to(weight.device, weight.dtype)

    def embed_prompt(
        self, model: Any, processor: Any, instruction: str, taken: "torch.Tensor | SourceText"
    ) -> "torch.Tensor":
        """The prompt alone: the audio is attended to from every layer."""
        import torch

        before, after = self.prompt_ids(processor, instruction)
        device = model.model.decoder.embed_tokens.weight.device
        return self.embed(model, torch.tensor([*before, *after], device=device))

    def conditions(self, taken: "Sequence[torch.Tensor | SourceText]") -> "dict[str, torch.Tensor]":
        """The encoder's states, (rows, 1500, width)."""
        import torch

        heard = [states for states in taken if isinstance(states, torch.Tensor)]
        return {"encoder_hidden_states": torch.stack(heard)}

    def number_layer(self, layer: Any, index: int) -> None:
        """Tells both attentions of a layer its place in the cache."""
        layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = index

    @contextmanager
    def sliced(self, model: Any, kept: Sequence[int]) -> Iterator[None]:
        """See `Family.sliced`: the count of layers has another name here."""
        config = model.config
        before = config.decoder_layers
        config.decoder_layers = len(kept)
        try:
            yield
        finally:
            config.decoder_layers = before

    def enter(
        self, decoder: Any, inputs: "torch.Tensor", places: "torch.Tensor"
    ) -> "tuple[torch.Tensor, Any]":
        """Inputs (…, width) with the learnt positions of their places (…) added."""
        return inputs + decoder.embed_positions.weight[places], None

    def cache_width(self, model: Any) -> int:
        """See `Family.cache_width`: of the tokens alone, not of the encoder's states."""
        return 2 * int(model.config.d_model) * int(model.config.decoder_layers)

    def new_cache(self) -> Any:
        """A cache for both attentions."""
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The prompt's tokens; the audio has no place among them."""
        return instruction

    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """The prompt's ids, the last one apart: a text is predicted from it.

        Raises:
            FamilyError: a token that the tokenizer does not have: the model knows English only.
        """
        tokenizer = processor.tokenizer
        names = [f"<|{name}" for name in instruction.split("<|") if name]
        vocabulary = tokenizer.get_vocab()
        missing = [name for name in names if name not in vocabulary]
        if missing:
            raise FamilyError(
                f"The tokenizer has no {', '.join(missing)}",
                expected="a multilingual Whisper",
                mend="choose a language that it knows",
            )
        ids = [int(vocabulary[name]) for name in names]
        return ids[:-1], ids[-1:]

    def said(self, text: str) -> str:
        """A text as Whisper writes it: it begins with a space."""
        return f" {text}"

    def stock_inputs(
        self, processor: Any, audio: Any, instruction: str, dtype: "torch.dtype"
    ) -> dict[str, "torch.Tensor"]:
        """Features of the whole window, and the prompt."""
        import torch

        before, after = self.prompt_ids(processor, instruction)
        return {
            "input_features": _features(processor, audio).to(dtype),
            "decoder_input_ids": torch.tensor([[*before, *after]]),
        }

    def stock_generate(
        self, model: Any, inputs: dict[str, "torch.Tensor"], **options: Any
    ) -> list[int]:
        """Stock greedy search: Whisper's own `generate` around it makes a prompt and cuts timestamps."""
        from transformers import GenerationMixin

        plain: Any = GenerationMixin
        output = plain.generate(model, **inputs, **options)
        tokens: list[int] = output[0, inputs["decoder_input_ids"].shape[1] :].tolist()
        return tokens


def _prompt(lang: Language, task: str) -> str:
    return f"<|startoftranscript|><|{lang.code}|><|{task}|><|notimestamps|>"


def _features(processor: Any, audio: FloatArray) -> "torch.Tensor":
    """Log-mel features of one clip, padded to the window: (1, mels, 3000)."""
    extractor = processor.feature_extractor
    found: torch.Tensor = extractor(
        audio, sampling_rate=extractor.sampling_rate, return_tensors="pt"
    ).input_features
    return found
