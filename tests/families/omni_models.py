"""Makes small thinkers of Qwen2.5-Omni."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from tests import tiny

MARKS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
AUDIO: dict[str, Any] = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "output_dim": 64,
    "n_window": 20,
}
"""Pieces of 0.4 s, so that a short clip has several."""
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}


def make_omni(path: Path, **text: Any) -> Path:
    """Saves a random model; `text` overrides the decoder's settings."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.make_tokenizer().backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens=MARKS,
    )
    ids = {name: int(tokenizer.convert_tokens_to_ids(mark)) for name, mark in MARKS.items()}
    settings = {
        "vocab_size": 544,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 3, 3],
        },
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **text,
    }
    config = Qwen2_5OmniThinkerConfig(
        text_config=settings,
        audio_config=AUDIO,
        vision_config=VISION,
        audio_token_index=ids["audio_token"],
        image_token_index=ids["image_token"],
        video_token_index=ids["video_token"],
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        # Stock code reads it, its config class does not declare it; the released configs have it.
        vision_start_token_id=ids["vision_bos_token"],
    )
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            small = "language_model" in name and ("o_proj" in name or "down_proj" in name)
            torch.nn.init.normal_(parameter, std=0.05 if small else 0.15)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
    )
    model.save_pretrained(path)
    write_processor(path, tokenizer)
    return path


def write_processor(path: Path, tokenizer: Any) -> None:
    """What a checkpoint on the hub has of a processor: its image parts need torchvision to be made here."""
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE, encoding="utf8")
    facts = {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor": WhisperFeatureExtractor(feature_size=16).to_dict(),
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (path / "processor_config.json").write_text(json.dumps(facts, default=float), encoding="utf8")
