"""Gemma 4 with an audio tower (E2B, E4B): per-layer embeddings, shared keys and values, two kinds of layers.

A layer may go if what stays still finds what it reads. Kept are always

- the layers whose keys and values the last `num_kv_shared_layers` read (the last of each kind below them);
- the last layer: stock code makes whatever comes last a full-attention layer.

All else follows from the kept layers' numbers: `layer_types`, `per_layer_config`, the count of sharing
layers, and the slices of the two tables that hold every layer's own embedding side by side.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halve.audio import FloatArray
from halve.families.base import SYSTEM_PROMPT, Counts, Family, kept_slices, resolve
from halve.families.processors import load_hearing

if TYPE_CHECKING:
    import torch

FULL, SLIDING = "full_attention", "sliding_attention"
PATTERN = 6
"""Where a config names no layer types, every sixth layer attends to everything."""
TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "attention_bias": False,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "enable_moe_block": False,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
}
"""What stock code takes for keys that a config leaves out."""
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
_STACKED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
"""Which tensors of the decoder hold every layer's part side by side, and along which dimension."""
_SHARED_LEFTOVERS = tuple(f"self_attn.{name}." for name in ("k_proj", "v_proj", "k_norm", "v_norm"))


class Gemma4(Family):
    """Gemma 4 E2B, E4B and models of their class (transformers: Gemma4ForConditionalGeneration)."""

    name = "gemma4"
    model_types: tuple[str, ...] = ("gemma4",)
    auto_class = "AutoModelForMultimodalLM"
    max_audio_s = 30.0
    text_defaults: Mapping[str, Any] = TEXT_DEFAULTS
    processor_class = "Gemma4Processor"
    extractor_class = "Gemma4AudioFeatureExtractor"

    layers = "model.language_model.layers"
    decoder = "model.language_model"
    embeddings = "model.language_model.embed_tokens"
    norm = "model.language_model.norm"
    head = "lm_head"
    audio_tower = "model.audio_tower"
    projector = "model.embed_audio"
    no_onnx = "shared keys and values, per-layer embeddings and two kinds of attention heads have no graph yet"
    images: tuple[str, ...] = ("model.vision_tower", "model.embed_vision")
    unquantised: tuple[str, ...] = (
        *images,
        "model.language_model.per_layer_model_projection",
    )

    disk_layers = "model.language_model.layers."
    disk_embeddings = "model.language_model.embed_tokens."
    disk_head = "model.language_model.embed_tokens."
    disk_audio_tower = "model.audio_tower."
    disk_projector = "model.embed_audio."

    # What may go

    def must_stay(self, config: Mapping[str, Any]) -> dict[int, str]:
        """The last layer, and those whose keys and values later layers read."""
        text = self.text_config(config)
        types, shared = layer_types(text), int(text["num_kv_shared_layers"])
        first_shared = len(types) - shared
        found = {len(types) - 1: "the last layer must be one of full attention"}
        for kind in set(types[first_shared:]) if shared else ():
            producer = max(layer for layer in range(first_shared) if types[layer] == kind)
            readers = [n for n in range(first_shared, len(types)) if types[n] == kind]
            found[producer] = (
                f"layers {', '.join(map(str, readers))} read its keys and values (num_kv_shared_layers)"
            )
        return found

    # Config and tensors

    def kept_config(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config after pruning: everything that counts or names layers."""
        kept = self.check_kept(config, kept)
        new = copy.deepcopy(dict(config))
        text, before = new["text_config"], self.text_config(config)
        types = layer_types(before)
        first_shared = len(types) - int(before["num_kv_shared_layers"])
        text["num_hidden_layers"] = len(kept)
        text["layer_types"] = [types[layer] for layer in kept]
        text["num_kv_shared_layers"] = sum(layer >= first_shared for layer in kept)
        if "per_layer_config" in text:
            old = {int(layer): facts for layer, facts in text["per_layer_config"].items()}
            text["per_layer_config"] = {
                str(new_number): old[layer] for new_number, layer in enumerate(kept) if layer in old
            }
        new["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", True))
        return new

    def is_surplus(self, config: Mapping[str, Any], key: str) -> bool:
        """Keys and values stored for a layer that reads another's: stock code never loads them."""
        if not key.startswith(self.disk_layers):
            return super().is_surplus(config, key)
        number, _, rest = key[len(self.disk_layers) :].partition(".")
        text = self.text_config(config)
        shares = int(number) >= text["num_hidden_layers"] - text["num_kv_shared_layers"]
        return shares and rest.startswith(_SHARED_LEFTOVERS)

    def stacked_axis(self, key: str) -> int | None:
        """See `Family.stacked_axis`: the table of per-layer embeddings, and their projection."""
        return _STACKED.get(key.removeprefix(self.disk_layers.removesuffix("layers.")))

    @contextmanager
    def sliced(self, model: Any, kept: Sequence[int]) -> Iterator[None]:
        """See `Family.sliced`."""
        decoder = resolve(model, self.decoder)
        config = decoder.config
        text = {**config.to_dict(), "model_type": config.model_type}
        new = self.kept_config({"text_config": text}, kept)["text_config"]
        settings, first_shared = dict(vars(config)), decoder.first_kv_shared_layer_idx
        stacked = {
            key: resolve(decoder, key)
            for key in _STACKED
            if getattr(decoder, key.partition(".")[0], None) is not None
        }
        whole = {key: parameter.data for key, parameter in stacked.items()}
        try:
            # The counts first: the rest is checked against them.
            config.per_layer_config = None
            for name in ("num_hidden_layers", "layer_types", "num_kv_shared_layers"):
                setattr(config, name, new[name])
            config.per_layer_config = new.get("per_layer_config")
            decoder.first_kv_shared_layer_idx = len(kept) - new["num_kv_shared_layers"]
            for key, parameter in stacked.items():
                parameter.data = kept_slices(
                    whole[key], _STACKED[key], text["num_hidden_layers"], kept
                )
            yield
        finally:
            for key, parameter in stacked.items():
                parameter.data = whole[key]
            vars(config).clear()
            vars(config).update(settings)
            decoder.first_kv_shared_layer_idx = first_shared

    # Counting

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Counted from the shapes in the config; missing keys have the stock class's defaults."""
        text = self.text_config(config)
        layers = len(layer_types(text))
        hidden, own = text["hidden_size"], text["hidden_size_per_layer_input"] or 0
        decoder = sum(_count_layer(text, layer) for layer in range(layers))
        table = text["vocab_size"] * hidden
        embeddings = table + text["vocab_size_per_layer_input"] * layers * own
        # All layers' projection of the main embedding, and one norm.
        beside = (layers * own * hidden + own if own else 0) + hidden
        head = 0 if config.get("tie_word_embeddings", True) else table
        tower, projector, tower_buffers = self._count_audio(config, hidden)
        vision, vision_buffers = self._count_vision(config, hidden)
        total = decoder + embeddings + beside + head + tower + projector + vision
        return Counts(
            total,
            tower,
            projector,
            embeddings,
            head,
            decoder // layers,
            layers,
            all_layers=decoder,
            buffers=layers + tower_buffers + vision_buffers,
        )

    def _count_audio(self, config: Mapping[str, Any], hidden: int) -> tuple[int, int, int]:
        """Parameters of tower and projector, and the tower's stored clipping bounds."""
        audio = config.get("audio_config")
        if audio is None:
            return 0, 0, 0
        width, layers = audio.get("hidden_size", 1024), audio.get("num_hidden_layers", 12)
        first, second = audio.get("subsampling_conv_channels", (128, 32))
        out = audio.get("output_proj_dims", 1536)
        subsampling = 10 * first + 9 * first * second + second + first // 4 * second * width
        # Two feed-forwards, five square projections of attention, the convolution, ten norms.
        layer = 2 * 8 * width**2 + 5 * width**2 + 3 * width**2 + 9 * width
        layer += width // audio.get("num_attention_heads", 8)
        layer += audio.get("conv_kernel_size", 5) * width
        tower = subsampling + layers * layer + width * out + out
        clipped = 40 * layers if audio.get("use_clipped_linears", True) else 0
        return tower, out * hidden, clipped

    def _count_vision(self, config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
        """Parameters of the vision tower with its projector, and its stored bounds."""
        vision = config.get("vision_config")
        if vision is None:
            return 0, 0
        width, layers = vision.get("hidden_size", 768), vision.get("num_hidden_layers", 16)
        dim = vision.get("head_dim", 64)
        heads, kv_heads = (
            vision.get(f"num_{kind}_heads", 12) for kind in ("attention", "key_value")
        )
        patch = 3 * vision.get("patch_size", 16) ** 2
        embedder = patch * width + 2 * vision.get("position_embedding_size", 10_240) * width
        layer = 2 * width * dim * (heads + kv_heads) + 2 * dim + 4 * width
        layer += 3 * width * vision.get("intermediate_size", 3072)
        buffers = 28 * layers if vision.get("use_clipped_linears", False) else 0
        buffers += 2 * width if vision.get("standardize", False) else 0
        return embedder + layers * layer + width * hidden, buffers

    # Asking and hearing

    def load_processor(self, path: Path) -> Any:
        """The stock processor; without torchvision, which only its image and video parts need, one without these."""
        hearing = load_hearing(path, self.processor_class, self.extractor_class)
        return super().load_processor(path) if hearing is None else hearing

    def encode(self, model: Any, processor: Any, audio: Any) -> "torch.Tensor":
        """The tower's states: (positions, width), 25 positions a second."""
        import torch

        tower = resolve(model, self.audio_tower)
        heard = self.features(processor, audio)
        like = next(tower.parameters())
        mask = heard["input_features_mask"].to(like.device)
        output = tower(heard["input_features"].to(like.device, like.dtype), mask)
        states: torch.Tensor = output.last_hidden_state[output.attention_mask]
        return states

    # Tokens take more than their embedding: a token's inputs are its embedding with, behind it, what
    # every layer adds for this token, all layers side by side. Audio adds what the padding token would.

    def embed(self, model: Any, ids: "torch.Tensor") -> "torch.Tensor":
        """See `Family.embed`: (..., hidden + layers x own).

        A placeholder of audio, image or video that the model itself says is read as padding, as in stock code.
        """
        import torch

        decoder = resolve(model, self.decoder)
        for name in _PLACEHOLDERS:
            if (placeholder := getattr(model.config, name)) is not None:
                ids = ids.masked_fill(ids == placeholder, decoder.config.pad_token_id)
        embedded: torch.Tensor = decoder.embed_tokens(ids)
        if not self._own_width(decoder):
            return embedded
        return torch.cat([embedded, decoder.embed_tokens_per_layer(ids)], dim=-1)

    def project(self, model: Any, states: "torch.Tensor") -> "torch.Tensor":
        """See `Family.project`; with what the layers add for a padding token, as stock code does for audio."""
        import torch

        projected = super().project(model, states)
        decoder = resolve(model, self.decoder)
        if not self._own_width(decoder):
            return projected
        padding = torch.full(projected.shape[:-1], decoder.config.pad_token_id)
        own = decoder.embed_tokens_per_layer(padding.to(projected.device))
        return torch.cat([projected, own.to(projected.dtype)], dim=-1)

    def decoder_inputs(self, model: Any, inputs: "torch.Tensor") -> "dict[str, torch.Tensor]":
        """See `Family.decoder_inputs`."""
        decoder = resolve(model, self.decoder)
        hidden, own = self._apart(decoder, inputs)
        return {"inputs_embeds": hidden} | ({} if own is None else {"per_layer_inputs": own})

    def enter(
        self, decoder: Any, inputs: "torch.Tensor", places: "torch.Tensor"
    ) -> "tuple[torch.Tensor, Any]":
        """See `Family.enter`: beside the states go both kinds' rotations and each layer's own inputs."""
        hidden, own = self._apart(decoder, inputs)
        kinds = sorted(set(decoder.config.layer_types))
        rotary = {kind: decoder.rotary_emb(hidden[None], places[None], kind) for kind in kinds}
        if own is not None:
            own = decoder.project_per_layer_inputs(hidden[None], own[None])
        return hidden, (rotary, own)

    def layer_inputs(self, layer: Any, beside: Any, shared: dict[str, Any]) -> dict[str, Any]:
        """See `Family.layer_inputs`."""
        rotary, own = beside
        found = {
            "position_embeddings": rotary[layer.self_attn.layer_type],
            "shared_kv_states": shared,
        }
        return found if own is None else {**found, "per_layer_input": own[:, :, layer.layer_idx]}

    def cache_width(self, model: Any) -> int:
        """See `Family.cache_width`."""
        config = resolve(model, self.decoder).config
        return sum(2 * each.num_key_value_heads * each.head_dim for each in config.per_layer_config)

    def logits(self, model: Any, hidden: "torch.Tensor") -> "torch.Tensor":
        """The head's logits, capped as the config says."""
        import torch

        found = super().logits(model, hidden)
        cap = resolve(model, self.decoder).config.final_logit_softcapping
        return found if cap is None else torch.tanh(found / cap) * cap

    def _own_width(self, decoder: Any) -> int:
        return int(getattr(decoder, "hidden_size_per_layer_input", None) or 0)

    def _apart(
        self, decoder: Any, inputs: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Embeddings (..., hidden) and each layer's own inputs (..., layers, own), if there are any."""
        width = self._own_width(decoder)
        if not width:
            return inputs, None
        hidden = decoder.config.hidden_size
        return inputs[..., :hidden], inputs[..., hidden:].unflatten(-1, (-1, width))

    def features(self, processor: Any, audio: FloatArray) -> Any:
        """What the stock feature extractor makes of one clip."""
        extractor = processor.feature_extractor
        return extractor([audio], sampling_rate=extractor.sampling_rate, return_tensors="pt")

    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The paper's prompt in the model's chat form, without thinking, with one audio placeholder."""
        chat = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM_PROMPT}]},
            {
                "role": "user",
                "content": [{"type": "audio"}, {"type": "text", "text": instruction}],
            },
        ]
        text: str = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return text

    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """The prompt split at the audio; its begin and end marks, which stock code adds, stay with the text."""
        tokenizer = processor.tokenizer
        marked = f"{processor.boa_token}{processor.audio_token}{processor.eoa_token}"
        text = self.prompt_text(processor, instruction).replace(processor.audio_token, marked)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        place = ids.index(processor.audio_token_id)
        return ids[:place], ids[place + 1 :]

    def stock_inputs(
        self, processor: Any, audio: Any, instruction: str, dtype: "torch.dtype"
    ) -> dict[str, "torch.Tensor"]:
        """See Family.stock_inputs; the prompt begins with its own begin token."""
        inputs = processor(
            text=[self.prompt_text(processor, instruction)],
            audio=[audio],
            sampling_rate=processor.feature_extractor.sampling_rate,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in inputs.items()
        }


def layer_types(text: Mapping[str, Any]) -> list[str]:
    """Each layer's kind, as stock code takes it: the last is always one of full attention."""
    types = text.get("layer_types") or [
        SLIDING if (layer + 1) % PATTERN else FULL for layer in range(text["num_hidden_layers"])
    ]
    return [*types[:-1], FULL]


def _layer_facts(text: Mapping[str, Any], layer: int, kind: str) -> dict[str, Any]:
    """The decoder's config with what holds for this layer alone."""
    if "per_layer_config" in text:
        own = {int(n): facts for n, facts in text["per_layer_config"].items()}.get(layer, {})
    elif kind == FULL:
        own = {"head_dim": text["global_head_dim"]}
        if text["attention_k_eq_v"] and text["num_global_key_value_heads"] is not None:
            own["num_key_value_heads"] = text["num_global_key_value_heads"]
    else:
        own = {}
    return {**text, **own}


def _count_layer(text: Mapping[str, Any], layer: int) -> int:
    """Parameters of one decoder layer; a sharing one has no keys and values, and perhaps a wider MLP."""
    types = layer_types(text)
    facts = _layer_facts(text, layer, types[layer])
    shares = layer >= len(types) - text["num_kv_shared_layers"]
    hidden, dim = text["hidden_size"], facts["head_dim"]
    queries = text["num_attention_heads"] * dim
    keys = facts["num_key_value_heads"] * dim
    bias = int(bool(text["attention_bias"]))
    count = 2 * hidden * queries + bias * (queries + hidden) + dim
    if not shares:
        values = 1 if text["attention_k_eq_v"] and types[layer] == FULL else 2
        count += values * (hidden + bias) * keys + dim
    wide = 2 if text["use_double_wide_mlp"] and shares else 1
    count += 3 * hidden * text["intermediate_size"] * wide + 4 * hidden
    if text["hidden_size_per_layer_input"]:
        count += 2 * hidden * text["hidden_size_per_layer_input"] + hidden
    if text["enable_moe_block"]:
        experts, inner = text["num_experts"], text["moe_intermediate_size"]
        count += experts * hidden + hidden + experts + 3 * experts * hidden * inner + 3 * hidden
    return int(count)
