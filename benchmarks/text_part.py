"""A speech model's decoder as a text model of its own: what other runtimes can load.

Run as `python -m benchmarks.text_part MODEL OUT POSITIONS…`: writes the model, and a prompt of each
length with the tokens that stock `generate` says after it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halve.families import family_for
from halve.models import load_processor, read_config
from halve.shards import read_index

REFERENCE_TOKENS = 32


def write_text_model(model: Path, out: Path) -> None:
    """Writes the decoder in float32 under the names that its own stock class knows.

    The configuration is one that transformers 4 reads too: some exporters need it. The embedding table
    is also written beside `out`, for runtimes that are fed embeddings.
    """
    family = family_for(read_config(model))
    text = AutoConfig.from_pretrained(str(model), local_files_only=True).get_text_config()
    config: dict[str, Any] = text.to_dict()
    config |= {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
        "dtype": "float32",
        "torch_dtype": "float32",
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": False,
        # A model without a first token; exporters want a number, no prompt here uses it.
        "bos_token_id": config.get("bos_token_id") or 0,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf8")
    norm = family.disk_layers.removesuffix("layers.") + "norm."
    prefixes = {
        family.disk_layers: "model.layers.",
        norm: "model.norm.",
        family.disk_embeddings: "model.embed_tokens.",
        family.disk_head: "lm_head.",
    }
    tensors = _renamed(model, prefixes)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    np.save(out.parent / "table.npy", tensors["model.embed_tokens.weight"].numpy())
    tokenizer = load_processor(model).tokenizer
    (out / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.eos_token}
    settings["unk_token"] = tokenizer.unk_token or tokenizer.eos_token
    settings["bos_token"] = tokenizer.bos_token or tokenizer.eos_token
    (out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf8")


def _renamed(model: Path, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    tensors = {}
    for key, name in read_index(model).items():
        for prefix, new in prefixes.items():
            if key.startswith(prefix):
                with safe_open(str(model / name), framework="pt") as file:
                    tensor = file.get_tensor(key).float().contiguous()
                tensors[new + key.removeprefix(prefix)] = tensor
    return tensors


def write_prompt(text_model: Path, positions: int, out: Path) -> None:
    """Writes a prompt as token ids and as embeddings, and the tokens of stock `generate` in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(text_model), dtype=torch.float32)
    model.train(False)
    vocabulary = model.config.vocab_size
    ids = np.random.default_rng(positions).integers(vocabulary // 4, vocabulary, positions)
    rows = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        said = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            min_new_tokens=REFERENCE_TOKENS,
            max_new_tokens=REFERENCE_TOKENS,
            pad_token_id=0,
        )
        embeddings = model.get_input_embeddings()(rows)[0]
    tokens = said[0, positions:].numpy().astype(np.int64)
    ends = np.atleast_1d(np.array(model.generation_config.eos_token_id, np.int64))
    np.savez(out, ids=ids, embeddings=embeddings.numpy(), tokens=tokens, ends=ends)


def main() -> int:
    """Writes what the command line asks for."""
    model, out, *lengths = sys.argv[1:]
    write_text_model(Path(model), Path(out))
    for positions in map(int, lengths):
        write_prompt(Path(out), positions, Path(out) / f"prompt-{positions}.npz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
