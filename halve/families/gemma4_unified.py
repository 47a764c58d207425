"""Gemma 4 without an audio encoder (12B): raw frames of 640 samples, 40 ms, go through one linear projector."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halve.families.gemma4 import TEXT_DEFAULTS, Gemma4

if TYPE_CHECKING:
    import torch


class Gemma4Unified(Gemma4):
    """Gemma 4 12B and models of its class (transformers: Gemma4UnifiedForConditionalGeneration)."""

    name = "gemma4_unified"
    model_types = ("gemma4_unified",)
    processor_class = "Gemma4UnifiedProcessor"
    extractor_class = "Gemma4UnifiedAudioFeatureExtractor"
    text_defaults: Mapping[str, Any] = {
        **TEXT_DEFAULTS,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }

    audio_tower = ""
    disk_audio_tower = ""
    unquantised = images = ("model.embed_vision",)

    def encode(self, model: Any, processor: Any, audio: Any) -> "torch.Tensor":
        """The clip's frames as they are: (positions, samples), 25 positions a second."""
        heard = self.features(processor, audio)
        frames: torch.Tensor = heard["input_features"][heard["input_features_mask"]]
        return frames

    def _count_audio(self, config: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
        audio = config.get("audio_config")
        return 0, 0 if audio is None else audio.get("audio_embed_dim", 640) * hidden, 0

    def _count_vision(self, config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
        vision = config.get("vision_config")
        if vision is None:
            return 0, 0
        side = vision.get("patch_size", 16) * vision.get("pooling_kernel_size", 3)
        patch, width = 3 * side**2, vision.get("mm_embed_dim", 3840)
        # Three layer norms around the patch's projection and its place, then the projector.
        embedder = 2 * patch + patch * width + width + 4 * width
        embedder += 2 * vision.get("mm_posemb_size", 1120) * width
        return embedder + vision.get("output_proj_dims", 3840) * hidden, 0
