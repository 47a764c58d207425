"""Qwen2-Audio: a Whisper encoder with a pooled output, one linear projector, a Qwen2 decoder."""

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from halve.audio import FloatArray
from halve.families.base import SYSTEM_PROMPT, Counts, Family, GgufLayout, resolve
from halve.families.windows import windowed_above

if TYPE_CHECKING:
    import torch

FRAME_MULTIPLE = 4
"""Mel frames a pooled encoder position stands for: two convolution strides by two pooled."""
MARGIN_FRAMES = 4
"""Frames past the last valid one that the convolutions look at; without them the output differs."""

TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
"""What stock code takes for keys that a config leaves out: the released ones name few of these."""
SEVEN_B: dict[str, Any] = {
    "model_type": "qwen2_audio",
    "audio_config": {
        "num_mel_bins": 128,
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "max_source_positions": 1500,
    },
    "text_config": {**TEXT_DEFAULTS, "vocab_size": 156_032, "intermediate_size": 11_008},
}
"""The shapes of Qwen2-Audio-7B: 8,397,094,912 parameters."""


class Qwen2Audio(Family):
    """Qwen2-Audio-7B and models of its class (transformers: Qwen2AudioForConditionalGeneration)."""

    name = "qwen2_audio"
    model_types = ("qwen2_audio",)
    onnx_layouts = frozenset({"qwen2"})
    gguf_layouts: Mapping[str, GgufLayout] = MappingProxyType({"qwen2": GgufLayout("qwen2")})
    auto_class = "AutoModelForMultimodalLM"
    max_audio_s = 30.0
    text_defaults: Mapping[str, Any] = TEXT_DEFAULTS
    released: Mapping[str, Mapping[str, Any]] = MappingProxyType(
        {"Qwen/Qwen2-Audio-7B": SEVEN_B, "Qwen/Qwen2-Audio-7B-Instruct": SEVEN_B}
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
        """The config after pruning: layer count, each layer's kind of attention, an explicit untied head.

        Stock code derives from the layers' numbers which of them attend to a window, where the config does not
        list it: after pruning, others would.
        """
        kept = self.check_kept(config, kept)
        new = copy.deepcopy(dict(config))
        text = new["text_config"]
        text["num_hidden_layers"] = len(kept)
        kinds = windowed_above(self.text_config(config))
        if kinds is not None:
            text["layer_types"] = [kinds[layer] for layer in kept]
        if text.get("max_window_layers") is not None:
            text["max_window_layers"] = min(text["max_window_layers"], len(kept))
        # The stock default is True, which would drop this model's separate head on loading.
        new["tie_word_embeddings"] = text["tie_word_embeddings"] = False
        return new

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Counted from the shapes in the config; missing keys have the stock class's defaults."""
        text, audio = self.text_config(config), config.get("audio_config") or {}
        hidden, ffn, heads = (
            int(text[key]) for key in ("hidden_size", "intermediate_size", "num_attention_heads")
        )
        kv_heads = text["num_key_value_heads"] or heads
        head_dim = text.get("head_dim") or hidden // heads
        query, key_value = heads * head_dim, kv_heads * head_dim
        attention = 2 * hidden * query + query + 2 * (hidden * key_value + key_value)
        per_layer = attention + 3 * hidden * ffn + 2 * hidden
        layers, vocabulary = int(text["num_hidden_layers"]), int(text["vocab_size"])
        tower = count_tower(audio)
        projector = audio.get("d_model", 1280) * hidden + hidden
        total = tower + projector + 2 * vocabulary * hidden + hidden + per_layer * layers
        table = vocabulary * hidden
        return Counts(total, tower, projector, table, table, per_layer, layers)

    def encode(self, model: Any, processor: Any, audio: FloatArray) -> "torch.Tensor":
        """The tower's pooled states on valid frames: (positions, width), 25 positions a second.

        Stock code pads every clip to 30 s. Attention is masked to the valid positions there, so that
        encoding those frames and a margin gives the same states (to 1e-5 in fp32) in less time.
        """
        import torch

        tower = resolve(model, self.audio_tower)
        features, valid = self.features(processor, audio)
        weight = tower.conv1.weight
        states = torch.from_numpy(features)[None].to(weight.device, weight.dtype)
        return self.tower_states(tower, states, valid)

    def features(self, processor: Any, audio: FloatArray) -> tuple[FloatArray, int]:
        """Log-mel features of one clip with a margin of silence.

        Returns:
            (mels, frames), and the number of valid frames.
        """
        extractor = processor.feature_extractor
        audio = audio[: extractor.n_samples]
        valid = -(-len(audio) // extractor.hop_length)
        longest = extractor.n_samples // extractor.hop_length
        frames = -(-(valid + MARGIN_FRAMES) // FRAME_MULTIPLE) * FRAME_MULTIPLE
        frames = min(frames, longest)
        padded = np.zeros(frames * extractor.hop_length, dtype=np.float32)
        padded[: len(audio)] = audio
        mel = extractor(
            padded,
            sampling_rate=extractor.sampling_rate,
            padding="do_not_pad",
            return_tensors="np",
        ).input_features[0]
        return np.ascontiguousarray(mel[:, :frames], dtype=np.float32), valid

    def tower_states(self, tower: Any, features: "torch.Tensor", valid: int) -> "torch.Tensor":
        """The stock encoder's forward pass on (1, mels, frames), of which `valid` frames are speech."""
        import torch
        from torch.nn import functional

        states = functional.gelu(tower.conv1(features))
        states = functional.gelu(tower.conv2(states)).permute(0, 2, 1)
        states = states + tower.embed_positions.weight[: states.shape[1]]
        heard = (valid - 1) // 2 + 1
        mask = torch.zeros(1, 1, 1, states.shape[1], dtype=states.dtype, device=states.device)
        mask[..., heard:] = torch.finfo(states.dtype).min
        mask = mask.expand(1, 1, states.shape[1], states.shape[1])
        for layer in tower.layers:
            states = layer(states, mask)
        pooled = tower.avg_pooler(states.permute(0, 2, 1)).permute(0, 2, 1)
        normed: torch.Tensor = tower.layer_norm(pooled)
        return normed[0, : (heard - 2) // 2 + 1]

    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The paper's prompt in the model's chat form, with one audio placeholder."""
        chat = [
            {"role": "system", "content": SYSTEM_PROMPT},
            {
                "role": "user",
                "content": [
                    {"type": "audio", "audio_url": ""},
                    {"type": "text", "text": instruction},
                ],
            },
        ]
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return text

    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """The prompt split at the audio placeholder; the begin and end marks stay with the text."""
        tokenizer = processor.tokenizer
        audio_id = tokenizer.convert_tokens_to_ids(processor.audio_token)
        ids = tokenizer(self.prompt_text(processor, instruction), add_special_tokens=False)[
            "input_ids"
        ]
        place = ids.index(audio_id)
        return ids[:place], ids[place + 1 :]


def count_tower(audio: Mapping[str, Any]) -> int:
    """Parameters of the Whisper encoder, its fixed positions included."""
    width, ffn = audio.get("d_model", 1280), audio.get("encoder_ffn_dim", 5120)
    mels, positions = audio.get("num_mel_bins", 128), audio.get("max_source_positions", 1500)
    convolutions = 3 * mels * width + width + 3 * width * width + width
    # Four attention projections, three with a bias (Whisper's keys have none), two layer norms.
    attention = 4 * width * width + 3 * width
    layer = attention + 2 * width * ffn + ffn + width + 4 * width
    layers = int(audio.get("encoder_layers", 32))
    return int(convolutions + positions * width + layers * layer + 2 * width)
