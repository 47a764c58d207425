"""Makes a model of another decoder shape to measure speed on: random weights, an existing model's tower.

    python -m benchmarks.shapes --like demo/teacher --layers 12 --hidden 512 --out runs/wide

Speed does not depend on what the weights say; tokens do, so such a model is no use for quality.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, GenerationConfig

from halve.errors import HalveError
from halve.families import family_for, resolve
from halve.models import load_processor, read_config

HEAD_CHANNELS = 64
FEED_FORWARD = 2.6875
"""Feed-forward width of Qwen2-Audio-7B's decoder over its hidden width (11008 / 4096)."""
_FEED_FORWARD_MULTIPLE = 128
_STANDARD_DEVIATION = 0.05


def make_shape(like: Path, layers: int, hidden: int, out: Path, seed: int = 0) -> Path:
    """Saves a bfloat16 model with a random decoder of the 7B model's proportions, vocabulary as `like`'s.

    As in the 7B model, every query head has keys and values of its own.

    Raises:
        FamilyError: `like` is of no known family.
    """
    family = family_for(read_config(like))
    loader = getattr(transformers, family.auto_class)
    config = AutoConfig.from_pretrained(str(like), local_files_only=True)
    text = config.get_text_config()
    text.num_hidden_layers, text.max_window_layers = layers, layers
    text.layer_types = [text.layer_types[0]] * layers
    text.hidden_size, text.head_dim = hidden, HEAD_CHANNELS
    text.num_attention_heads = text.num_key_value_heads = hidden // HEAD_CHANNELS
    steps = round(FEED_FORWARD * hidden / _FEED_FORWARD_MULTIPLE)
    text.intermediate_size = steps * _FEED_FORWARD_MULTIPLE
    torch.manual_seed(seed)
    model = loader.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_STANDARD_DEVIATION)
    source = loader.from_pretrained(str(like), local_files_only=True, dtype=torch.float32)
    tower = resolve(source, family.audio_tower).state_dict()
    resolve(model, family.audio_tower).load_state_dict(tower)
    model.generation_config = GenerationConfig.from_pretrained(str(like))
    model.to(torch.bfloat16).save_pretrained(out)
    load_processor(like).save_pretrained(out)
    return out


def main() -> int:
    """Reads the command line and makes the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", type=Path, required=True, help="the model whose tower is taken")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        make_shape(given.like, given.layers, given.hidden, given.out, given.seed)
    except HalveError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
