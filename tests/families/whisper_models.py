"""A small random Whisper with a tokenizer that has Whisper's special tokens."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from tests import tiny

SPECIALS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|zh|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]


def make_tokenizer() -> WhisperTokenizer:
    """Byte-level BPE over the test words, in Whisper's own class."""
    base = tiny.make_tokenizer()
    backend = base.backend_tokenizer.model
    vocabulary = {t: i for t, i in base.get_vocab().items() if t not in tiny.SPECIALS}
    del backend
    ordered = {token: place for place, token in enumerate(sorted(vocabulary, key=vocabulary.get))}
    tokenizer = WhisperTokenizer(vocab=ordered, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    return tokenizer


def make_whisper(path: Path, *, seed: int = 0, layers: int = 6, **changes: Any) -> Path:
    """Saves a random model whose decoder layers matter little, and differ."""
    tokenizer = make_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_layers=layers,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        max_target_positions=96,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **changes,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "encoder.embed_positions" not in name:
            small = "out_proj" in name or "fc2" in name
            torch.nn.init.normal_(parameter, std=0.06 if small else 0.2)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[config.eos_token_id] *= 2
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
        suppress_tokens=[5, 9, 40],
        begin_suppress_tokens=[ids["<|endoftext|>"], 12],
        alignment_heads=[[1, 0], [2, 3], [4, 1], [5, 2]],
        is_multilingual=True,
        lang_to_id={name: ids[name] for name in ("<|en|>", "<|de|>", "<|zh|>")},
        task_to_id={name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        max_length=96,
    )
    model.save_pretrained(path)
    extractor = WhisperFeatureExtractor(feature_size=80)
    WhisperProcessor(extractor, tokenizer).save_pretrained(path)
    return path
