"""Which decoder layers attend to a window, where a config leaves that to the class."""

from collections.abc import Mapping
from typing import Any

MAX_WINDOW_LAYERS = 28
"""What the Qwen classes take for a max_window_layers that a config leaves out."""


def windowed_above(config: Mapping[str, Any]) -> list[str] | None:
    """The kinds of layers of a Qwen decoder, where those from max_window_layers on attend to a window.

    Those that the config lists, else those that stock code derives; None where no window is used.
    """
    if config.get("layer_types"):
        return list(config["layer_types"])
    # A window that is left out is the class's own; null is none.
    if not config.get("use_sliding_window") or config.get("sliding_window", "own") is None:
        return None
    above = config.get("max_window_layers")
    full = MAX_WINDOW_LAYERS if above is None else int(above)
    layers = int(config["num_hidden_layers"])
    return ["full_attention" if n < full else "sliding_attention" for n in range(layers)]
