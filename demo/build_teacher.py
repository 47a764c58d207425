"""Builds the demo's base model: a small stock Qwen2-Audio that `halve teach` then turns into a teacher.

    python -m demo.build_teacher --text text.jsonl --work-dir WORK --out BASE

1. takes Whisper tiny.en's pretrained encoder from a package (demo/whisper_encoder.py);
2. trains a byte-level BPE tokenizer over the three languages of the `train` split;
3. warms the Qwen2 decoder up on text translation in the very prompts of the speech task
   (demo/warm_up.py; resumable, cut by its wall-clock budget);
4. writes a directory that stock transformers loads, in bf16, with tokenizer and processor.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
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

from demo import whisper_encoder

SIZE_LIMIT_BYTES = 45_000_000
MAX_NEW_TOKENS = 128

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
AUDIO_BOS, AUDIO, AUDIO_EOS = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, AUDIO_BOS, AUDIO, AUDIO_EOS)

SYSTEM_PROMPT = "You are a professional translator."
USER_PROMPTS = {
    "de": "Translate the English speech into German:",
    "zh": "Translate the English speech into Chinese:",
    "en": "Transcribe the English speech:",
}
# One user turn may hold audio and text, as Qwen2-Audio's own template has it: each audio is numbered,
# and a conversation without a system turn gets a default one.
CHAT_TEMPLATE = """\
{%- set audios = namespace(seen=0) -%}
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'audio' -%}
{%- set audios.seen = audios.seen + 1 -%}
{{- 'Audio ' ~ audios.seen ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\\n' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# Words with the space before them, single digits, runs of punctuation. Chinese has no spaces: a run of
# its characters is one "word", within which the merges find the real ones.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class DecoderShape:
    """The Qwen2 decoder of the demo: small, and every size a multiple of 64 for 4-bit kernels."""

    num_layers: int = 12
    hidden_size: int = 256
    ffn_size: int = 768
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 8000
    max_positions: int = 2048
    initializer_range: float = 0.04


def read_sentences(paths: Sequence[Path], split: str) -> list[dict[str, str]]:
    """Entries (id, page, split, en, and de or zh or both) of one split from JSON-lines files, in their order."""
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines if line.strip()]
    return [row for row in rows if row["split"] == split]


def render_prompt(lang: str, audio: str = AUDIO) -> str:
    """The chat prompt for target `lang` with `audio` in the audio slot, up to the assistant's turn."""
    return (
        f"{IM_START}system\n{SYSTEM_PROMPT}{IM_END}\n{IM_START}user\nAudio 1: "
        f"{AUDIO_BOS}{audio}{AUDIO_EOS}\n{USER_PROMPTS[lang]}{IM_END}\n{IM_START}assistant\n"
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` and the prompts, with Qwen2-Audio's special tokens first.

    The prompts are fed in many times over so that each of their words becomes one token: they are
    part of every sequence that the model will ever see.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_prompts(texts), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START, AUDIO_BOS, AUDIO, AUDIO_EOS],
        padding_side="left",
        model_max_length=DecoderShape.max_positions,
        clean_up_tokenization_spaces=False,
    )


def _with_prompts(texts: Iterable[str], repeats: int = 2000) -> Iterator[str]:
    yield from texts
    words = [
        "system\n",
        "user\n",
        "assistant\n",
        "Audio 1: ",
        SYSTEM_PROMPT,
        *USER_PROMPTS.values(),
    ]
    for _ in range(repeats):
        yield from words


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2AudioProcessor:
    """Processor of a Qwen2-Audio with Whisper's 80 mel bins."""
    extractor = WhisperFeatureExtractor(feature_size=whisper_encoder.MEL_BINS)
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=CHAT_TEMPLATE)


def build_config(tokenizer: PreTrainedTokenizerFast, shape: DecoderShape) -> Qwen2AudioConfig:
    """Model configuration; the head is separate from the embeddings, which both levels must say."""
    audio_config = Qwen2AudioEncoderConfig(
        num_mel_bins=whisper_encoder.MEL_BINS,
        d_model=whisper_encoder.D_MODEL,
        encoder_layers=whisper_encoder.NUM_LAYERS,
        encoder_attention_heads=whisper_encoder.NUM_HEADS,
        encoder_ffn_dim=whisper_encoder.FFN_DIM,
        max_source_positions=whisper_encoder.MAX_FRAMES,
    )
    text_config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        max_window_layers=shape.num_layers,
        initializer_range=shape.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    return Qwen2AudioConfig(
        audio_config=audio_config,
        text_config=text_config,
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO),
        tie_word_embeddings=False,
    )


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy decoding that ends at the end of the assistant's turn."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )


def assemble(
    config: Qwen2AudioConfig,
    audio_state: dict[str, Tensor],
    decoder_state: dict[str, Tensor] | None,
    seed: int = 0,
) -> Qwen2AudioForConditionalGeneration:
    """The whole model in float32: pretrained encoder, decoder (warmed up, or drawn from `seed`).

    `decoder_state` has the keys of Qwen2ForCausalLM (``model.…`` and ``lm_head.weight``).
    """
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config)
    model.model.audio_tower.load_state_dict(audio_state)
    if decoder_state is not None:
        decoder = {k.removeprefix("model."): v for k, v in decoder_state.items()}
        model.lm_head.load_state_dict({"weight": decoder.pop("lm_head.weight")})
        model.model.language_model.load_state_dict(decoder)
    init_projector(model)
    return model


@torch.no_grad()
def init_projector(model: Qwen2AudioForConditionalGeneration) -> None:
    """Gives projected audio frames zero mean and the norm of the decoder's token embeddings.

    The encoder ends in a layer norm, out of which a frame has mean beta and, about it, the variance
    gamma^2; a random semi-orthogonal projection keeps hidden_size / d_model of it.
    """
    norm = model.model.audio_tower.layer_norm
    linear = model.model.multi_modal_projector.linear
    torch.nn.init.orthogonal_(linear.weight)
    embedding_norm = model.get_input_embeddings().weight.norm(dim=1).mean().item()
    frame_norm = norm.weight.norm().item() * math.sqrt(linear.out_features / linear.in_features)
    linear.weight.mul_(embedding_norm / frame_norm)
    linear.bias.copy_(-linear.weight @ norm.bias)


def save_base(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, out_dir: Path
) -> int:
    """Writes model (bf16), tokenizer and processor to `out_dir`; returns the size in bytes.

    Raises ValueError where the directory is not smaller than SIZE_LIMIT_BYTES.
    """
    model.generation_config = generation_config(processor.tokenizer)
    model.to(torch.bfloat16).save_pretrained(out_dir)
    processor.save_pretrained(out_dir)
    tokenizer_path = out_dir / "tokenizer.json"
    vocabulary = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    # The indented file is more than twice as large.
    tokenizer_path.write_text(
        json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )
    size_bytes = sum(path.stat().st_size for path in out_dir.rglob("*") if path.is_file())
    if size_bytes >= SIZE_LIMIT_BYTES:
        raise ValueError(f"{out_dir} has {size_bytes} bytes, the limit is {SIZE_LIMIT_BYTES}")
    return size_bytes


def load_or_train_tokenizer(
    text_paths: Sequence[Path], work_dir: Path, vocab_size: int
) -> PreTrainedTokenizerFast:
    """The tokenizer kept in `work_dir`, trained first if it is not there."""
    tokenizer_dir = work_dir / "tokenizer"
    if not (tokenizer_dir / "tokenizer.json").is_file():
        rows = read_sentences(text_paths, "train")
        texts = [row[lang] for row in rows for lang in ("en", "de", "zh") if lang in row]
        train_tokenizer(texts, vocab_size).save_pretrained(tokenizer_dir)
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)


def build_parser() -> argparse.ArgumentParser:
    """Command line of this script; the warm-up's options are those of demo/warm_up.py."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="JSON lines: id, split, en, de, zh"
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="downloads and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the base model's directory")
    parser.add_argument("--vocab-size", type=int, default=DecoderShape.vocab_size)
    parser.add_argument(
        "--no-warm-up",
        action="store_true",
        help="write the model with what the last warm-up checkpoint holds, or with a fresh decoder",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Builds the base model; a warm-up cut short goes on from its checkpoint at the next call."""
    from demo import warm_up

    parser = build_parser()
    warm_up.add_options(parser)
    options = parser.parse_args(arguments)
    tokenizer = load_or_train_tokenizer(options.text, options.work_dir, options.vocab_size)
    shape = DecoderShape(vocab_size=options.vocab_size)
    config = build_config(tokenizer, shape)
    if not options.no_warm_up:
        recipe = warm_up.recipe_of(options)
        warm_up.run(config.text_config, tokenizer, options.text, options.work_dir, recipe)
    variables = whisper_encoder.read_ctranslate2(
        whisper_encoder.fetch_model_file(options.work_dir / "whisper")
    )
    decoder_state = warm_up.load_decoder(options.work_dir)
    model = assemble(config, whisper_encoder.encoder_state(variables), decoder_state)
    size_bytes = save_base(model, build_processor(tokenizer), options.out)
    print(f"{options.out}: {size_bytes:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
