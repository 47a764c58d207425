"""Which decoders can be written as ONNX, as far as a config says: for plans, long before the weights are read."""

from collections.abc import Mapping
from typing import Any

MAX_WINDOW_LAYERS = 28
"""What the Qwen classes take for a max_window_layers that a config leaves out."""
MISTRAL_WINDOW = 4096
"""What the Mistral class takes for a window that its config leaves out; null is none."""


def unlike_onnx(text: Mapping[str, Any], layouts: frozenset[str]) -> str:
    """What of a decoder's config ONNX packages do not know, in words; nothing where they know it all.

    Args:
        text: the decoder's config, the class's defaults filled in.
        layouts: decoder model types whose layers the family's packages know.
    """
    kind = str(text.get("model_type"))
    if kind not in layouts:
        return f"a decoder of type {kind}"
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    turns = rope.get("rope_type") or rope.get("type") or "default"
    if turns != "default":
        return f"rotary embeddings of type {turns!r}"
    activation = text.get("hidden_act") or "silu"
    if activation != "silu":
        return f"the activation {activation!r}"
    if text.get("attention_bias") or text.get("mlp_bias"):
        return "biases in attention's output or in the MLP"
    return _window(kind, text)


def _window(kind: str, text: Mapping[str, Any]) -> str:
    kinds = set(text.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        return f"layers of {', '.join(sorted(kinds))}"
    if text.get("layer_types"):
        return ""
    if kind == "mistral" and text.get("sliding_window", MISTRAL_WINDOW) is not None:
        return f"an attention window of {text.get('sliding_window', MISTRAL_WINDOW)}"
    # Those of Qwen have one where they say so, from one of their layers on.
    is_windowed = text.get("use_sliding_window") and text.get("sliding_window", kind) is not None
    above = text.get("max_window_layers")
    first = MAX_WINDOW_LAYERS if above is None else int(above)
    if is_windowed and first < int(text["num_hidden_layers"]):
        return "an attention window in some layers"
    return ""
