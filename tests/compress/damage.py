"""Models with a weight that is not what it should be."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def spoilt(model: Path, path: Path, value: float) -> Path:
    """A copy of a model with one weight of decoder layer 3 set to a value."""
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    (key,) = (
        key for key in tensors if key.endswith("language_model.model.layers.3.mlp.up_proj.weight")
    )
    tensors[key][1, 2] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
