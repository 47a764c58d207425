"""Makes small Gemma 4 models with all that is difficult about them, and their processors' files."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from tests import tiny

MARKS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
TURNS = ["<|turn>", "<turn|>", "<|channel>", "<channel|>"]
SPECIALS = ["<pad>", "<eos>", "<bos>", *MARKS.values(), *TURNS, "<|video|>"]
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}<|audio|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n"
    "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
PATTERN = ["sliding_attention"] * 2 + ["full_attention"]
TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 64,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "layer_types": PATTERN * 3,
    "sliding_window": 16,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""Sliding and full layers with heads of their own size; the last three read keys and values of layers 4 and 5."""
AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [16, 16],
    "output_proj_dims": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "position_embedding_size": 16,
    "standardize": True,
    "use_clipped_linears": True,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows Gemma 4's marks by name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        " ".join(tiny.WORDS),
        " ".join(tiny.GERMAN),
        "Translate the English speech into German:",
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=MARKS,
    )


def make_processor(path: Path, kind: str, extractor: Any) -> PreTrainedTokenizerFast:
    """Writes what a checkpoint on the hub has of a processor: its image parts need torchvision to be made here."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf8")
    facts = {
        "processor_class": f"{kind}Processor",
        "feature_extractor": extractor.to_dict(),
        "image_processor": {"image_processor_type": f"{kind}ImageProcessor"},
        "video_processor": {"video_processor_type": f"{kind}VideoProcessor"},
    }
    (path / "processor_config.json").write_text(json.dumps(facts, default=float), encoding="utf8")
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The marks' ids as the config names them."""
    named = {"eoa_token_index": "eoa_token", **{f"{name}_id": name for name in MARKS}}
    del named["eoa_token_id"]
    found = {key: tokenizer.convert_tokens_to_ids(MARKS[name]) for key, name in named.items()}
    return {**found, "video_token_id": tokenizer.convert_tokens_to_ids("<|video|>")}


def liven(model: Any) -> None:
    """Makes next tokens far apart, no layer overwhelming, and every norm and scalar its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = 0.05 if "embed_tokens" in name else 0.15
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
        for layer in model.model.language_model.layers:
            layer.layer_scalar.copy_(0.8 + 0.4 * torch.rand(1, generator=generator))
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.mul_(0.4)


def save(model: Any, path: Path) -> None:
    """Writes the model with greedy generation settings."""
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        # What they would say most: a token anywhere, and one to begin with.
        suppress_tokens=[12],
        begin_suppress_tokens=[151],
    )
    model.save_pretrained(path)


def make_gemma4(path: Path, **text: Any) -> Path:
    """Saves a random Gemma 4 of the E2B kind; `text` overrides the decoder's settings."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_processor(path, "Gemma4", Gemma4AudioFeatureExtractor(feature_size=16))
    config = Gemma4Config(
        text_config={**TEXT, **text},
        audio_config=AUDIO,
        vision_config=VISION,
        **token_ids(tokenizer),
    )
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config)
    liven(model)
    save(model, path)
    return path


def make_gemma4_unified(path: Path, **text: Any) -> Path:
    """Saves a random Gemma 4 of the 12B kind: no tower, shared key and value projections in full layers."""
    path.mkdir(parents=True, exist_ok=True)
    extractor = Gemma4UnifiedAudioFeatureExtractor()
    tokenizer = make_processor(path, "Gemma4Unified", extractor)
    own = {"vocab_size_per_layer_input", "hidden_size_per_layer_input", "use_double_wide_mlp"}
    settings = {key: value for key, value in TEXT.items() if key not in own}
    settings |= {
        "num_hidden_layers": 6,
        "layer_types": PATTERN * 2,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        **text,
    }
    config = Gemma4UnifiedConfig(
        text_config=settings,
        audio_config={},
        vision_config={"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64},
        **token_ids(tokenizer),
    )
    torch.manual_seed(0)
    model = Gemma4UnifiedForConditionalGeneration(config)
    liven(model)
    save(model, path)
    return path
