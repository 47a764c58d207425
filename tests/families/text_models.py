"""Small random text models of every layout, and a corpus of plain text."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from halve import artefact
from halve.corpus import Segment, write_manifest
from tests import tiny

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3},
    "qwen3": {},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 3},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 24, "sliding_window_pattern": 3, "use_qk_norm": False},
}
"""What is difficult of each: windows, kinds of layers, biases, norms."""


def make_config(model_type: str, **changes: Any) -> Any:
    """The config of the real class."""
    ids = tiny.make_tokenizer()
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": ids.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": ids.convert_tokens_to_ids("<|endoftext|>"),
        **SETTINGS[model_type],
        **changes,
    }
    return AutoConfig.for_model(model_type, **settings)


def make_model(path: Path, model_type: str, *, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model whose layers matter little and whose translations end by themselves."""
    config = make_config(model_type, **changes)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            small = "o_proj" in name or "down_proj" in name
            torch.nn.init.normal_(parameter, std=0.04 if small else 0.15)
    if not config.tie_word_embeddings:
        with torch.no_grad():
            model.lm_head.weight[config.eos_token_id] *= 2.5
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def make_corpus(path: Path, *, train: int = 8, select: int = 4, test: int = 4) -> Path:
    """Saves a corpus without audio."""
    words = list(zip(tiny.WORDS, tiny.GERMAN, strict=True))
    with artefact.writing(path, "corpus", {"made": "tiny text"}, 7, {}) as draft:
        segments = []
        for index, split in enumerate(["train"] * train + ["select"] * select + ["test"] * test):
            chosen = [words[(index * 5 + place * 3) % len(words)] for place in range(2 + index % 4)]
            segments.append(
                Segment(
                    id=f"t{index:03d}",
                    audio="",
                    offset_s=0.0,
                    duration_s=0.0,
                    source_lang="en",
                    source_text=" ".join(word for word, _ in chosen) + ".",
                    references={"de": " ".join(word for _, word in chosen) + "."},
                    split=split,
                    group=f"{split}-{index}",
                )
            )
        write_manifest(draft.path, segments)
    return path


def stock_tokens(path: Path, ids: list[int], limit: int) -> list[int]:
    """What stock transformers says after `ids`, through the auto class, without halve."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    output = model.generate(torch.tensor([ids]), max_new_tokens=limit, do_sample=False)
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens
