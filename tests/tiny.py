"""Makes small models of the real class and small corpora of real files."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)

from halve import artefact
from halve.audio import SAMPLE_RATE_HZ
from halve.corpus import Segment, write_manifest

SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_bos|>",
    "<|AUDIO|>",
    "<|audio_eos|>",
]
CHAT_TEMPLATE = (
    "{% set audio = namespace(count=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "{% set audio.count = audio.count + 1 %}Audio {{ audio.count }}: "
    "<|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "open",
    "close",
    "the",
    "file",
    "menu",
    "new",
    "old",
    "image",
    "text",
    "page",
    "table",
    "select",
    "insert",
    "delete",
    "save",
    "print",
]
GERMAN = [
    "öffnen",
    "schließen",
    "die",
    "Datei",
    "Menü",
    "neu",
    "alt",
    "Bild",
    "Text",
    "Seite",
    "Tabelle",
    "wählen",
    "einfügen",
    "löschen",
    "sichern",
    "drucken",
]
CHINESE = [
    "打开",
    "关闭",
    "这个",
    "文件",
    "菜单",
    "新",
    "旧",
    "图像",
    "文本",
    "页面",
    "表格",
    "选择",
    "插入",
    "删除",
    "保存",
    "打印",
]


def make_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the test words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompt = "You are a professional translator. Translate the English speech into German Chinese: Audio 1:"
    tokenizer.train_from_iterator(
        [" ".join(WORDS), " ".join(GERMAN), "".join(CHINESE), prompt], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIALS,
        padding_side="left",
    )


def make_model(path: Path, *, seed: int = 0, **decoder: Any) -> Path:
    """Saves a random model; `decoder` overrides Qwen2Config values."""
    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "tie_word_embeddings": False,
        **decoder,
    }
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=80,
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            max_source_positions=1500,
        ).to_dict(),
        text_config=Qwen2Config(**settings).to_dict(),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        # Larger than the default, so that a random model's next tokens are far apart and vary.
        if parameter.dim() > 1 and "embed_positions" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
    )
    model.save_pretrained(path)
    extractor = WhisperFeatureExtractor(feature_size=80)
    Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(path)
    return path


def tone(duration_s: float, seed: int) -> np.ndarray:
    """A sweep with noise, so that no two clips are alike."""
    generator = np.random.default_rng(seed)
    time_s = np.arange(int(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    low, high = sorted(generator.uniform(100, 3000, 2))
    sweep = np.sin(2 * np.pi * (low + (high - low) * time_s / duration_s / 2) * time_s)
    noise = generator.normal(0, 0.05, len(time_s))
    return (0.4 * sweep + noise).astype(np.float32)


def make_corpus(path: Path, *, train: int = 12, select: int = 6, test: int = 6) -> Path:
    """Saves a corpus artefact of short clips."""
    generator = np.random.default_rng(7)
    with artefact.writing(path, "corpus", {"made": "tiny"}, 7, {}) as draft:
        (draft.path / "audio").mkdir(exist_ok=True)
        segments = []
        splits = ["train"] * train + ["select"] * select + ["test"] * test
        for index, split in enumerate(splits):
            duration_s = round(float(generator.uniform(0.6, 1.6)), 2)
            name = f"audio/{index:03d}.wav"
            samples = tone(duration_s, index)
            soundfile.write(draft.path / name, samples, SAMPLE_RATE_HZ, subtype="PCM_16")
            chosen = generator.choice(len(WORDS), 4, replace=False)
            segments.append(
                Segment(
                    id=f"s{index:03d}",
                    audio=name,
                    offset_s=0.0,
                    duration_s=duration_s,
                    source_lang="en",
                    source_text=" ".join(WORDS[i] for i in chosen),
                    references={
                        "de": " ".join(GERMAN[i] for i in chosen),
                        "zh": "".join(CHINESE[i] for i in chosen),
                    },
                    split=split,
                    group=f"{split}-{index // 3}",
                )
            )
        write_manifest(draft.path, segments)
    return path
