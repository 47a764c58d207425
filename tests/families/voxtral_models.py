"""Makes small Voxtral models."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import tiny

FIRST = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
    "[/SYSTEM_PROMPT] [TOOL_CONTENT]"
)
MARKS = {**dict(enumerate(FIRST.split())), 24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
"""Tekken's marks at their places: the stock processor knows the audio's by number."""
NUM_MARKS = 40
VOCAB_SIZE = 512
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(path: Path) -> None:
    """Writes tekken.json, the only file of a tokenizer that Voxtral's checkpoints have."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - NUM_MARKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*tiny.WORDS, *tiny.GERMAN, "Translate the English speech into German:"]
    bpe.train_from_iterator([" ".join(texts)], trainer)
    characters = {character: byte for byte, character in bytes_to_unicode().items()}
    ordered = sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__)
    pieces = [bytes(characters[one] for one in piece) for piece in ordered]
    merged = [piece for piece in pieces if len(piece) > 1]
    every = [bytes([byte]) for byte in range(256)] + merged
    vocab = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(piece).decode("ascii"),
            "token_str": piece.decode("utf8", errors="ignore") or None,
        }
        for rank, piece in enumerate(every)
    ]
    marks = [
        {"rank": rank, "token_str": MARKS.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(NUM_MARKS)
    ]
    facts = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(vocab),
            "default_vocab_size": len(vocab) + NUM_MARKS,
            "default_num_special_tokens": NUM_MARKS,
            "version": "v7",
        },
        "vocab": vocab,
        "special_tokens": marks,
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
        },
    }
    (path / "tekken.json").write_text(json.dumps(facts), encoding="utf8")


def make_voxtral(path: Path, **text: Any) -> Path:
    """Saves a random model; `text` overrides the decoder's settings."""
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 11,
        **text,
    }
    audio = {
        "num_mel_bins": 16,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration(
        VoxtralConfig(text_config=settings, audio_config=audio, audio_token_id=24)
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_positions" not in name:
            small = "language_model" in name and ("o_proj" in name or "down_proj" in name)
            torch.nn.init.normal_(parameter, std=0.05 if small else 0.15)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=11)
    model.save_pretrained(path)
    # As on the hub: no processor_config.json, no tokenizer.json.
    extractor = WhisperFeatureExtractor(feature_size=16).to_dict()
    extractor["processor_class"] = "VoxtralProcessor"
    text = json.dumps(extractor, default=float)
    (path / "preprocessor_config.json").write_text(text, encoding="utf8")
    write_tokenizer(path)
    return path
