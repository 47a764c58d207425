"""Which decoders can be written as ONNX, as far as a config says: for plans, long before the weights are read."""

from collections.abc import Mapping
from typing import Any

from halve.families.windows import windowed_above

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
    if kind == "mistral" and not text.get("layer_types"):
        window = text.get("sliding_window", MISTRAL_WINDOW)
        return "" if window is None else f"an attention window of {window}"
    others = set(windowed_above(text) or ()) - {"full_attention"}
    return f"layers of {', '.join(sorted(others))}" if others else ""
