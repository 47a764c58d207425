"""Voxtral: a Whisper encoder that always hears 30 s, four of its states a position, a Llama decoder."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halve.families.base import Counts, Family, resolve
from halve.families.qwen2_audio import count_tower
from halve.families.text import count_decoder

if TYPE_CHECKING:
    import torch

TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 131_072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""What stock code takes for keys that a config leaves out."""
RELEASED: dict[str, dict[str, Any]] = {
    "mistralai/Voxtral-Mini-3B-2507": {
        "model_type": "voxtral",
        "audio_config": {},
        "text_config": {},
    },
    "mistralai/Voxtral-Small-24B-2507": {
        "model_type": "voxtral",
        "audio_config": {},
        "text_config": {
            "hidden_size": 5120,
            "intermediate_size": 32_768,
            "num_hidden_layers": 40,
        },
    },
}
_WHISPER = {
    "d_model": "hidden_size",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_layers": "num_hidden_layers",
    "num_mel_bins": "num_mel_bins",
    "max_source_positions": "max_source_positions",
}
"""Whisper's names of the encoder's settings, and Voxtral's."""
WINDOW_S = 30


class Voxtral(Family):
    """Voxtral Mini 3B, Small 24B and models of their class (transformers: VoxtralForConditionalGeneration)."""

    name = "voxtral"
    model_types = ("voxtral",)
    auto_class = "AutoModelForMultimodalLM"
    hears_whole_window = True
    max_audio_s = float(WINDOW_S)
    text_defaults = TEXT_DEFAULTS
    released = RELEASED
    no_onnx = (
        "its encoder stacks four states, and its projector has two layers, which have no graph yet"
    )

    layers = "model.language_model.layers"
    decoder = "model.language_model"
    embeddings = "model.language_model.embed_tokens"
    norm = "model.language_model.norm"
    head = "lm_head"
    audio_tower = "model.audio_tower"
    projector = "model.multi_modal_projector"

    disk_layers = "language_model.model.layers."
    disk_embeddings = "language_model.model.embed_tokens."
    disk_head = "language_model.lm_head."
    disk_audio_tower = "audio_tower."
    disk_projector = "multi_modal_projector."

    def kept_config(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config after pruning: layer count, per-layer lists, and an explicit untied head."""
        kept = self.check_kept(config, kept)
        new = copy.deepcopy(dict(config))
        text = new["text_config"]
        text["num_hidden_layers"] = len(kept)
        if text.get("layer_types"):
            text["layer_types"] = [text["layer_types"][layer] for layer in kept]
        new["tie_word_embeddings"] = text["tie_word_embeddings"] = False
        return new

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Counted from the shapes in the config; the class never ties its head."""
        decoder = count_decoder(self.text_config(config), tied=False)
        audio = config["audio_config"]
        tower = count_tower({old: audio[new] for old, new in _WHISPER.items() if new in audio})
        hidden = self.text_config(config)["hidden_size"]
        projector = (audio.get("intermediate_size", 5120) + hidden) * hidden
        return Counts(
            decoder.total + tower + projector,
            tower,
            projector,
            decoder.embeddings,
            decoder.head,
            decoder.per_layer,
            decoder.decoder_layers,
        )

    def encode(self, model: Any, processor: Any, audio: Any) -> "torch.Tensor":
        """The tower's states, as many side by side as the projector takes: (375, 4 x width).

        The model is shown all of the 30 s, silence and all, and was trained so: nothing can be cut.
        """
        import torch

        tower = resolve(model, self.audio_tower)
        like = tower.conv1.weight
        features = torch.from_numpy(self.features(processor, audio))
        states = tower(features.to(like.device, like.dtype)).last_hidden_state
        stacked: torch.Tensor = states.reshape(-1, tower.config.intermediate_size)
        return stacked

    def features(self, processor: Any, audio: Any) -> Any:
        """Log-mel features of one clip in a window of 30 s: (1, mels, 3000)."""
        extractor = processor.feature_extractor
        rate = extractor.sampling_rate
        return extractor(
            audio[: WINDOW_S * rate],
            sampling_rate=rate,
            padding=True,
            truncation=False,
            pad_to_multiple_of=WINDOW_S * rate,
            return_tensors="np",
        ).input_features

    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The prompt as Mistral's chat form writes it; the model knows no system turn."""
        return f"<s>[INST][BEGIN_AUDIO]{processor.audio_token}{instruction}[/INST]"

    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """The prompt's marks, audio left out, and the instruction.

        Stock `apply_chat_template` makes them of Mistral's own tokenizer and wants the audio in a file.
        """
        tokenizer = processor.tokenizer
        begin, inst, audio, end = (
            int(tokenizer.convert_tokens_to_ids(mark))
            for mark in ("<s>", "[INST]", "[BEGIN_AUDIO]", "[/INST]")
        )
        said = tokenizer(instruction, add_special_tokens=False)["input_ids"]
        return [begin, inst, audio], [*said, end]

    def stock_inputs(
        self, processor: Any, audio: Any, instruction: str, dtype: "torch.dtype"
    ) -> dict[str, "torch.Tensor"]:
        """See `Family.stock_inputs`: what `VoxtralProcessor.apply_chat_template` returns, without its files."""
        import torch

        before, after = self.prompt_ids(processor, instruction)
        features = torch.from_numpy(self.features(processor, audio))
        # Two mel frames a state, four states a position.
        positions = features.shape[-1] // 8
        ids = torch.tensor([[*before, *[processor.audio_token_id] * positions, *after]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": features.to(dtype),
        }
