"""What a model computes in where nothing else was asked for: float32, in which scores are compared, if there is room."""

import math
from pathlib import Path

from halve import environment
from halve.errors import HalveError
from halve.models import pick_device, resolve_model
from halve.progress import SILENT, Progress
from halve.shards import tensor_shapes

_WIDENED = ("F32", "BF16", "F16")


def roomy_dtype(model: str | Path, device: str = "auto", progress: Progress = SILENT) -> str:
    """float32; bfloat16, with a word to the user, where the weights would not fit in float32.

    Args:
        model: a model directory or a hub id.
        device: as `pick_device` takes it.

    Raises:
        ArtefactError: there is no such model.
    """
    place = pick_device(device)
    needed = _bytes_in_float32(resolve_model(model))
    room = environment.weights_room(place)
    if needed <= room:
        return "float32"
    where = "the GPU" if place != "cpu" else "main memory"
    progress.warn(
        f"{model} computes in bfloat16: in float32 its weights take {needed / 1e9:.1f} GB, "
        f"and {where} has room for {room / 1e9:.1f}."
    )
    return "bfloat16"


def fits_in_float32(model: str | Path, device: str = "auto") -> bool:
    """Whether a device has room for a model's weights in float32; see `roomy_dtype`."""
    room = environment.weights_room(pick_device(device))
    return _bytes_in_float32(resolve_model(model)) <= room


def _bytes_in_float32(model: Path) -> int:
    try:
        shapes = tensor_shapes(model).values()
    except HalveError:  # weights of another kind, or damage that loading will name
        return 0
    return sum(4 * math.prod(shape) for shape, kind in shapes if kind in _WIDENED)
