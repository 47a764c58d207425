"""Decoder-only language models that translate text: Qwen2 and 3, Llama, Mistral, Gemma, Cohere (Aya Expanse).

Their checkpoints are laid out alike, in memory and on disk. What differs is data: see LAYOUTS.
"""

import copy
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from halve.errors import FamilyError
from halve.families.base import Counts, Family, GgufLayout, SourceText, resolve
from halve.families.windows import windowed_above
from halve.languages import ENGLISH, Language

if TYPE_CHECKING:
    import torch

SOURCE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for the source text in a prompt, while a chat template is rendered and in what is shown of it."""


PROMPT_DATE = datetime.date(2024, 7, 26)
"""What Llama 3.2's template writes of itself where it cannot ask for the date."""
_DATED = "{% macro strftime_now(form) %}{{ form"
_DATED += "".join(f"|replace('%{form}', '{PROMPT_DATE:%{form}}')" for form in "aAbBdHIjMmpSyY")
_DATED += " }}{% endmacro %}"
"""Takes the place of the clock that stock code lends to templates."""


@dataclass(frozen=True)
class Layout:
    """Where a model type differs from Llama."""

    tied: bool = False
    """Whether head and embeddings are one table, where the config does not say."""
    qkv_bias: bool | None = None
    """None: as the config's attention_bias says, for the output projection too."""
    norms: int = 2
    """RMS or layer norms of the hidden size in a layer."""
    qk_norm: Literal["none", "head", "heads"] = "none"
    """Norms of queries and keys: one for all heads, or one for each where use_qk_norm says so."""
    full_every: str | int | None = None
    """Each so-many-th layer attends to everything, the others to a window (or the key that says so)."""
    windowed_above: bool = False
    """Whether layers from max_window_layers on attend to a window, where use_sliding_window says so."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the class takes for keys that a config.json leaves out."""


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(),
    "mistral": Layout(defaults={"num_key_value_heads": 8}),
    "qwen2": Layout(qkv_bias=True, windowed_above=True),
    "qwen3": Layout(qk_norm="head", windowed_above=True, defaults={"head_dim": 128}),
    "gemma": Layout(tied=True, defaults={"head_dim": 256}),
    "gemma2": Layout(tied=True, norms=4, full_every=2, defaults={"head_dim": 256}),
    "gemma3_text": Layout(
        tied=True,
        norms=4,
        qk_norm="head",
        full_every="sliding_window_pattern",
        defaults={
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window_pattern": 6,
            "vocab_size": 262208,
        },
    ),
    "cohere": Layout(tied=True, norms=1, qk_norm="heads"),
    "cohere2": Layout(
        tied=True,
        norms=1,
        full_every="sliding_window_pattern",
        defaults={"sliding_window_pattern": 4},
    ),
}


@dataclass
class TextProcessor:
    """What a text model has in place of a processor."""

    tokenizer: Any

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the tokenizer's files."""
        self.tokenizer.save_pretrained(path)


def written_chat(tokenizer: Any, chat: Sequence[Mapping[str, str]], **how: bool) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Without reasoning first, where the template offers that (Qwen3); where it puts in today's date (Llama 3.2,
    Mistral Small), with that of PROMPT_DATE: what a model is asked must not change at midnight.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _DATED + template
    text: str = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, enable_thinking=False, **how
    )
    return text


def _one_turn(tokenizer: Any, content: str) -> str:
    """The prompt of one user's turn.

    Raises:
        FamilyError: a template that takes no plain text (TranslateGemma wants both languages beside it).
    """
    from jinja2 import TemplateError

    try:
        chat = [{"role": "user", "content": content}]
        return written_chat(tokenizer, chat, add_generation_prompt=True)
    except TemplateError as error:
        raise FamilyError(
            f"The model's chat template takes no plain text ({error})",
            expected="a model that is asked in words",
            mend="put a plain chat template in its place (chat_template.jinja), or use another model",
        ) from None


class Text(Family):
    """Language models of the Llama family tree (transformers: AutoModelForCausalLM)."""

    name = "text"
    model_types = tuple(LAYOUTS)
    onnx_layouts = frozenset({"llama", "mistral", "qwen2"})
    gguf_layouts: Mapping[str, GgufLayout] = MappingProxyType(
        {
            "qwen2": GgufLayout("qwen2"),
            "llama": GgufLayout("llama", neighbours=True),
            "mistral": GgufLayout("llama", neighbours=True),
        }
    )
    auto_class = "AutoModelForCausalLM"
    reads = "text"

    layers = "model.layers"
    decoder = "model"
    embeddings = "model.embed_tokens"
    norm = "model.norm"
    head = "lm_head"

    disk_layers = "model.layers."
    disk_embeddings = "model.embed_tokens."
    disk_head = "lm_head."

    def text_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The whole config."""
        return config

    def instruction(self, target: Language, source: Language = ENGLISH) -> str:
        """What the model is asked for, before the text (Moslem et al. 2025, WMT)."""
        return f"Translate the following text from {source.name} to {target.name}:"

    def load_processor(self, path: Path) -> TextProcessor:
        """The tokenizer of a model directory."""
        from transformers import AutoTokenizer

        # Mistral's own code, where it is installed, has another interface, and shows no chat template.
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, mistral_format=False
        )
        return TextProcessor(tokenizer)

    def kept_config(self, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """The config after pruning: layer count, and each layer's kind of attention spelt out.

        Stock code derives the kinds from the layers' numbers where the config does not list them: after
        pruning, layers would attend in another way than they were trained to.
        """
        kept = self.check_kept(config, kept)
        new = copy.deepcopy(dict(config))
        self.set_kept(new, kept)
        return new

    def set_kept(self, text: dict[str, Any], kept: Sequence[int]) -> None:
        """Cuts a decoder's config down to the layers `kept`, in place."""
        kinds = layer_kinds(text)
        if kinds is not None:
            text["layer_types"] = [kinds[layer] for layer in kept]
        text["num_hidden_layers"] = len(kept)
        if text.get("max_window_layers") is not None:
            text["max_window_layers"] = min(text["max_window_layers"], len(kept))

    def count_parameters(self, config: Mapping[str, Any]) -> Counts:
        """Counted from the shapes in the config; a tied head is counted with the embeddings."""
        return count_decoder(self.text_config(config), self.is_tied(config))

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether head and embeddings are one table."""
        tied = config.get("tie_word_embeddings")
        return LAYOUTS[str(config["model_type"])].tied if tied is None else bool(tied)

    def is_surplus(self, config: Mapping[str, Any], key: str) -> bool:
        """A tied head that is stored beside the embeddings all the same, as Qwen3 0.6B's is."""
        is_head = key == f"{self.disk_head}weight" and self.is_tied(config)
        return is_head or super().is_surplus(config, key)

    def encode(self, model: Any, processor: Any, audio: Any) -> "torch.Tensor":
        """There is nothing to encode: the text stands in the prompt."""
        raise NotImplementedError("a text model has no audio tower")

    def take_in(self, model: Any, processor: Any, source: Any) -> SourceText:
        """The text itself: it is tokenised with the prompt around it, so that no token boundary is forced."""
        assert isinstance(source, SourceText)
        return source

    def prompt_template(self, processor: Any, instruction: str) -> tuple[str, str]:
        """The prompt before and after the source text: one user's turn of the model's chat template.

        A base model without a template is shown the turn's text alone.
        """
        content = f"{instruction}\n{SOURCE}\n"
        tokenizer = processor.tokenizer
        if getattr(tokenizer, "chat_template", None):
            content = _one_turn(tokenizer, content)
        before, _, after = content.partition(SOURCE)
        return before, after

    def prompt_text(self, processor: Any, instruction: str) -> str:
        """The prompt with a placeholder for the source text."""
        return SOURCE.join(self.prompt_template(processor, instruction))

    def source_ids(self, processor: Any, instruction: str, source: SourceText) -> list[int]:
        """Token ids of the whole prompt with a text in it."""
        before, after = self.prompt_template(processor, instruction)
        tokenizer = processor.tokenizer
        # A template writes its own begin token; without one the tokenizer adds what it is made to add.
        templated = bool(getattr(tokenizer, "chat_template", None))
        # Some templates trim a turn's text, which would take the final line break away here too.
        text = f"{before}{source.text.strip()}{after}"
        ids: list[int] = tokenizer(text, add_special_tokens=not templated)["input_ids"]
        return ids

    def prompt_ids(self, processor: Any, instruction: str) -> tuple[list[int], list[int]]:
        """The prompt's ids before and after the text. Only where no text is at hand: see `source_ids`."""
        tokenizer = processor.tokenizer
        before, after = (
            list(tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in self.prompt_template(processor, instruction)
        )
        return before, after

    def embed_prompt(
        self, model: Any, processor: Any, instruction: str, taken: "torch.Tensor | SourceText"
    ) -> "torch.Tensor":
        """See `Family.embed_prompt`."""
        import torch

        assert isinstance(taken, SourceText)
        table = resolve(model, self.embeddings)
        ids = self.source_ids(processor, instruction, taken)
        embedded: torch.Tensor = table(torch.tensor(ids, device=table.weight.device))
        return embedded

    def stock_inputs(
        self, processor: Any, audio: Any, instruction: str, dtype: "torch.dtype"
    ) -> dict[str, "torch.Tensor"]:
        """What stock `generate` takes for one text."""
        import torch

        ids = torch.tensor([self.source_ids(processor, instruction, audio)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def logits(self, model: Any, hidden: "torch.Tensor") -> "torch.Tensor":
        """The head's logits, scaled (Cohere) or capped (Gemma 2) as the config says."""
        import torch

        found: torch.Tensor = resolve(model, self.head)(hidden)
        config = resolve(model, self.decoder).config
        scale = getattr(config, "logit_scale", None)
        cap = getattr(config, "final_logit_softcapping", None)
        if scale is not None:
            found = found * scale
        return found if cap is None else torch.tanh(found / cap) * cap

    def rotary(self, decoder: Any, hidden: "torch.Tensor", places: "torch.Tensor") -> Any:
        """See `Family.rotary`; Gemma 3 has other frequencies in its windowed layers."""
        if decoder.config.model_type != "gemma3_text":
            return super().rotary(decoder, hidden, places)
        kinds = sorted(set(decoder.config.layer_types))
        return {kind: decoder.rotary_emb(hidden, places, kind) for kind in kinds}

    def rotary_of(self, layer: Any, rotary: Any) -> Any:
        """See `Family.rotary_of`."""
        return rotary[layer.self_attn.layer_type] if isinstance(rotary, dict) else rotary


def layer_kinds(config: Mapping[str, Any]) -> list[str] | None:
    """full_attention or sliding_attention for each layer; None for a model that has only the first."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    layers = int(config["num_hidden_layers"])
    layout = LAYOUTS[str(config["model_type"])]
    every = layout.full_every
    if isinstance(every, str):
        every = int(config.get(every) or layout.defaults[every])
    if every is not None:
        full = [(layer + 1) % every == 0 for layer in range(layers)]
    elif layout.windowed_above:
        return windowed_above(config)
    else:
        return None
    return ["full_attention" if is_full else "sliding_attention" for is_full in full]


def count_decoder(config: Mapping[str, Any], tied: bool) -> Counts:
    """Exact parameters of a decoder with its embeddings and head."""
    layout = LAYOUTS[str(config["model_type"])]
    facts = {
        **layout.defaults,
        **{key: value for key, value in config.items() if value is not None},
    }
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    kv_heads = facts.get("num_key_value_heads") or heads
    head_dim = facts.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, kv_heads * head_dim
    layer = 2 * hidden * (queries + keys) + 3 * hidden * facts["intermediate_size"]
    if layout.qkv_bias or facts.get("attention_bias"):
        layer += queries + 2 * keys + (0 if layout.qkv_bias else hidden)
    if facts.get("mlp_bias"):
        layer += 2 * facts["intermediate_size"] + hidden
    if layout.qk_norm == "head":
        layer += 2 * head_dim
    elif layout.qk_norm == "heads" and facts.get("use_qk_norm"):
        layer += queries + keys
    layer += layout.norms * hidden
    layers = int(facts["num_hidden_layers"])
    table = facts["vocab_size"] * hidden
    head = 0 if tied else table
    return Counts(
        total=table + head + hidden + layers * layer,
        audio_tower=0,
        projector=0,
        embeddings=table,
        head=head,
        per_layer=layer,
        decoder_layers=layers,
    )
