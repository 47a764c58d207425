"""The thinker of Qwen2.5-Omni: a Whisper encoder that attends within 2 s, a Qwen2 decoder with three positions a token.

Halve takes the part that hears and writes, as stock code saves it by itself; the parts that speak (talker,
token2wav) have nothing to do with translating into text.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from halve.audio import FloatArray
from halve.families.base import Counts, GgufLayout, resolve
from halve.families.processors import load_hearing
from halve.families.qwen2_audio import Qwen2Audio, count_tower

if TYPE_CHECKING:
    import torch

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
}
"""What stock code takes for keys that a config leaves out."""


class Qwen25Omni(Qwen2Audio):
    """The thinker of Qwen2.5-Omni 3B and 7B (transformers: Qwen2_5OmniThinkerForConditionalGeneration)."""

    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni_thinker",)
    refused: Mapping[str, str] = MappingProxyType(
        {
            # With what loading noted of names, saving would put the whole model's in front again.
            "qwen2_5_omni": "save its thinker by itself: thinker = "
            'Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(MODEL, dtype="auto"); '
            "thinker._weight_conversions = None; thinker.save_pretrained(DIR); and "
            "Qwen2_5OmniProcessor.from_pretrained(MODEL).save_pretrained(DIR)"
        }
    )
    text_defaults: Mapping[str, Any] = TEXT_DEFAULTS
    released: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    onnx_layouts: frozenset[str] = frozenset()
    gguf_layouts: Mapping[str, GgufLayout] = MappingProxyType({})
    no_onnx = "its encoder works in pieces of 2 s, which have no graph yet"
    projector = ""
    unquantised = images = ("model.visual",)

    disk_layers = "model.layers."
    disk_embeddings = "model.embed_tokens."
    disk_head = "lm_head."
    disk_projector = ""

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Counted from the shapes in the config; the class never ties its head."""
        text, audio = self.text_config(config), config.get("audio_config") or {}
        out = audio.get("output_dim", 3584)
        bare = super().count_parameters({"text_config": text, "audio_config": audio})
        # Positions are computed; a projection, and the marks that stock code no longer reads, are the tower's.
        width, positions = audio.get("d_model", 1280), audio.get("max_source_positions", 1500)
        tower = count_tower(audio) - positions * width + (width + 1) * out + 2 * out
        total = bare.total - bare.audio_tower - bare.projector + tower
        total += count_images(config.get("vision_config") or {})
        return Counts(
            total, tower, 0, bare.embeddings, bare.head, bare.per_layer, bare.decoder_layers
        )

    def load_processor(self, path: Path) -> Any:
        """The stock processor; without torchvision one that hears only."""
        hearing = load_hearing(path, "Qwen2_5OmniProcessor", "WhisperFeatureExtractor")
        return super().load_processor(path) if hearing is None else hearing

    def encode(self, model: Any, processor: Any, audio: FloatArray) -> "torch.Tensor":
        """The tower's states, as wide as the decoder's inputs: (positions, hidden), 25 positions a second."""
        import torch

        tower = resolve(model, self.audio_tower)
        features, valid = self.features(processor, audio)
        like = tower.conv1.weight
        # Valid frames alone, laid out as stock code cuts them from the window.
        heard = torch.from_numpy(features[:, :valid]).to(like.device, like.dtype)
        length = torch.tensor([valid], device=like.device)
        states: torch.Tensor = tower(heard, feature_lens=length).last_hidden_state
        return states

    def project(self, model: Any, states: "torch.Tensor") -> "torch.Tensor":
        """The states as they are: the tower ends in its own projection."""
        like = resolve(model, self.embeddings).weight
        return states.to(like.device, like.dtype)


def count_images(vision: Mapping[str, Any]) -> int:
    """Parameters of the image tower."""
    facts = {**VISION_DEFAULTS, **vision}
    width, ffn, merged = facts["hidden_size"], facts["intermediate_size"], facts["hidden_size"]
    merged *= facts["spatial_merge_size"] ** 2
    patch = facts["in_channels"] * facts["temporal_patch_size"] * facts["patch_size"] ** 2 * width
    layer = 4 * (width * width + width) + 3 * width * ffn + 2 * ffn + width + 2 * width
    merger = width + merged * merged + merged + (merged + 1) * facts["out_hidden_size"]
    return int(patch + facts["depth"] * layer + merger)
