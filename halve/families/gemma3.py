"""Gemma 3 with its image tower (4B, 12B, 27B), used as a text model: the decoder is Gemma 3's text model.

The tower and its projector stay in the checkpoint as they are, so that stock code loads the student: they are
never run here.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halve.families.base import Counts
from halve.families.text import Text, count_decoder

VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
"""What the tower's class takes for keys that a config.json leaves out."""


class Gemma3(Text):
    """Gemma 3 4B, 12B, 27B (transformers: Gemma3ForConditionalGeneration)."""

    name = "gemma3"
    model_types = ("gemma3",)
    auto_class = "AutoModelForMultimodalLM"

    layers = "model.language_model.layers"
    decoder = "model.language_model"
    embeddings = "model.language_model.embed_tokens"
    norm = "model.language_model.norm"
    unquantised = images = ("model.vision_tower", "model.multi_modal_projector")

    disk_layers = "language_model.model.layers."
    disk_embeddings = "language_model.model.embed_tokens."
    disk_head = "language_model.lm_head."

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The decoder's part, which need not name its own type."""
        return {"model_type": "gemma3_text", **config["text_config"]}

    def kept_config(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config after pruning: only the decoder's part changes."""
        new = copy.deepcopy(dict(config))
        text = dict(self.text_config(new))
        self.set_kept(text, self.check_kept(config, kept))
        new["text_config"] = text
        return new

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """The decoder's, and in the total the image tower's and its projector's."""
        text = self.text_config(config)
        counts = count_decoder(text, self.is_tied(config))
        images = count_images(config["vision_config"], int(text["hidden_size"]))
        return replace(counts, total=counts.total + images)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """See `Text.is_tied`: the whole model's config decides, not the decoder's part."""
        tied = config.get("tie_word_embeddings")
        return True if tied is None else bool(tied)


def count_images(vision: Mapping[str, Any], hidden: int) -> int:
    """Parameters of the SigLIP tower without its pooling head, and of what leads from it to the decoder."""
    facts = {**VISION_DEFAULTS, **vision}
    width, ffn, patch = facts["hidden_size"], facts["intermediate_size"], facts["patch_size"]
    patches = facts["num_channels"] * patch * patch * width + width
    positions = (facts["image_size"] // patch) ** 2 * width
    attention = 4 * (width * width + width)
    layer = attention + 2 * width * ffn + ffn + width + 2 * 2 * width
    tower = patches + positions + int(facts["num_hidden_layers"]) * layer + 2 * width
    return int(tower + width * hidden + width)
