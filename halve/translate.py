"""Translating speech: the protocol that every runtime fulfils, and the one on torch.

Decoding is greedy, as the paper's: the same tokens as stock `generate`, with audio encoded on its valid
frames only and finished rows leaving the batch.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from halve.audio import SAMPLE_RATE_HZ, FloatArray
from halve.languages import LANGUAGES, language, token_limit
from halve.models import SpeechModel

if TYPE_CHECKING:
    import torch

LOOP_TOKENS = 48
"""A translation that ends in the same few tokens repeated over this many is stuck."""
LOOP_PERIOD = 12
"""The longest repeated unit that counts as a loop, in tokens."""


@dataclass(frozen=True)
class Translation:
    """One segment's translation."""

    text: str
    tokens: list[int]
    """Generated tokens, without the one that ended them."""
    stopped: str
    """end: the model ended it; limit: cut at its token limit; loop: cut in a repetition."""


class Translator(Protocol):
    """What translates: a checkpoint on torch, an ONNX package, …"""

    family: str
    languages: tuple[str, ...]
    max_audio_s: float
    sample_rate_hz: int

    def translate(
        self,
        audio: Sequence[FloatArray],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> list[Translation]:
        """Translates clips (each of shape (samples,)) in any order, and returns them in the given one."""
        ...

    def stream(self, audio: FloatArray, lang: str, *, limit: int | None = None) -> Iterator[str]:
        """Translates one clip; what is yielded, joined, is the text that `translate` returns."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first: a lack of memory shows at once.

    The composition depends on `lengths` alone, so that a repeated run computes the same.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def is_looping(tokens: Sequence[int]) -> bool:
    """Whether the tokens end in a short unit that repeats over LOOP_TOKENS tokens."""
    if len(tokens) < LOOP_TOKENS:
        return False
    tail = list(tokens[-LOOP_TOKENS:])
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1))


def limits_for(audio: Sequence[FloatArray], limits: Sequence[int] | None) -> list[int]:
    """Token limits: those given, else by each clip's duration."""
    if limits is not None:
        return list(limits)
    return [token_limit(len(clip) / SAMPLE_RATE_HZ) for clip in audio]


class TextStream:
    """Turns a growing list of tokens into text that only ever grows."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._sent = ""

    def push(self, tokens: Sequence[int], last: bool = False) -> str:
        """The new text after `tokens`; half a character, or a space at the end, waits."""
        text = self._decode(tokens)
        if not last:
            if text.endswith("�"):
                return ""
            text = text.rstrip()
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new


class TorchTranslator:
    """Translates with a model on torch."""

    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, speech: SpeechModel, *, stop_loops: bool = False) -> None:
        """`stop_loops` cuts repetition loops before their limit; scores are made without it."""
        self.speech = speech
        self.family = speech.family.name
        self.languages = tuple(LANGUAGES)
        self.max_audio_s = speech.family.max_audio_s
        self._stop_loops = stop_loops
        self._ends = frozenset(speech.family.end_ids(speech.model))
        self._prompts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def encode_all(self, audio: Sequence[FloatArray]) -> "list[torch.Tensor]":
        """Projected embeddings of each clip: shape (positions, hidden)."""
        import torch

        speech = self.speech
        with torch.inference_mode():
            return [
                speech.family.project(
                    speech.model, speech.family.encode(speech.model, speech.processor, clip)
                )
                for clip in audio
            ]

    def translate(
        self,
        audio: Sequence[FloatArray],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
    ) -> list[Translation]:
        """See `Translator.translate`."""
        found: dict[int, Translation] = {}
        chosen = limits_for(audio, limits)
        for batch in plan_batches([len(clip) for clip in audio], batch_size):
            embeddings = self.encode_all([audio[index] for index in batch])
            rows = self.translate_embeddings(
                embeddings, lang, limits=[chosen[index] for index in batch], batch_size=len(batch)
            )
            found.update(zip(batch, rows, strict=True))
        return [found[index] for index in range(len(audio))]

    def translate_embeddings(
        self,
        embeddings: "Sequence[torch.Tensor]",
        lang: str,
        *,
        limits: Sequence[int],
        batch_size: int = 16,
    ) -> list[Translation]:
        """Translates clips that `encode_all` has encoded."""
        found: dict[int, Translation] = {}
        for batch in plan_batches([len(rows) for rows in embeddings], batch_size):
            decoding = _Decoding(self, [embeddings[index] for index in batch], lang)
            tokens, reasons = decoding.run([limits[index] for index in batch])
            for index, row, reason in zip(batch, tokens, reasons, strict=True):
                text = self.decode(row)
                found[index] = Translation(text, row, reason)
        return [found[index] for index in range(len(embeddings))]

    def stream(
        self, audio: FloatArray, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        """See `Translator.stream`; the generator's value is the whole translation."""
        decoding = _Decoding(self, self.encode_all([audio]), lang)
        stream = TextStream(self.decode)
        tokens: list[int] = []
        for step in decoding.steps(limits_for([audio], None if limit is None else [limit])):
            tokens = step[0]
            piece = stream.push(tokens)
            if piece:
                yield piece
        piece = stream.push(tokens, last=True)
        if piece:
            yield piece
        return Translation(self.decode(tokens), list(tokens), decoding.reasons[0])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self.speech.family.decode_text(self.speech.processor, tokens)

    def prompt(self, lang: str) -> "tuple[torch.Tensor, torch.Tensor]":
        """Embeddings of the prompt before and after the audio: shapes (tokens, hidden)."""
        import torch

        if lang not in self._prompts:
            family, model = self.speech.family, self.speech.model
            ids = family.prompt_ids(self.speech.processor, family.instruction(language(lang)))
            table = self.speech.part(family.embeddings)
            with torch.inference_mode():
                before, after = (
                    table(torch.tensor(part, device=table.weight.device)) for part in ids
                )
            self._prompts[lang] = (before, after)
            del model
        return self._prompts[lang]

    def close(self) -> None:
        """Frees the model."""
        self._prompts.clear()
        del self.speech

    def stops(self, tokens: Sequence[int], token: int, limit: int) -> str:
        """Why a row stops after `tokens` when the model says `token` next; empty if it goes on."""
        if token in self._ends:
            return "end"
        if len(tokens) + 1 >= limit:
            return "limit"
        return "loop" if self._stop_loops and is_looping([*tokens, token]) else ""


class _Decoding:
    """Greedy decoding of one left-padded batch."""

    def __init__(
        self, translator: TorchTranslator, embeddings: "Sequence[torch.Tensor]", lang: str
    ) -> None:
        self._translator = translator
        family = translator.speech.family
        self._decoder = translator.speech.part(family.decoder)
        self._head = translator.speech.part(family.head)
        self._table = translator.speech.part(family.embeddings)
        self._inputs, self._mask = self._pad(embeddings, *translator.prompt(lang))

    @staticmethod
    def _pad(
        embeddings: "Sequence[torch.Tensor]", before: "torch.Tensor", after: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        rows = [torch.cat([before, clip.to(before.dtype), after]) for clip in embeddings]
        longest = max(len(row) for row in rows)
        inputs = before.new_zeros(len(rows), longest, before.shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.long, device=before.device)
        for index, row in enumerate(rows):
            inputs[index, longest - len(row) :] = row
            mask[index, longest - len(row) :] = 1
        return inputs, mask

    def run(self, limits: Sequence[int]) -> tuple[list[list[int]], list[str]]:
        """All rows' tokens and why each stopped."""
        tokens: list[list[int]] = [[] for _ in limits]
        for rows in self.steps(limits):
            tokens = rows
        return tokens, self.reasons

    def steps(self, limits: Sequence[int]) -> Iterator[list[list[int]]]:
        """Yields all rows' tokens so far after each step."""
        import torch
        from transformers import DynamicCache

        tokens: list[list[int]] = [[] for _ in limits]
        self.reasons = [""] * len(limits)
        active = list(range(len(limits)))
        cache = DynamicCache()
        inputs, mask = self._inputs, self._mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while active:
            with torch.inference_mode():
                hidden = self._decoder(
                    inputs_embeds=inputs,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                chosen = self._head(hidden).argmax(-1)
            keep = self._take(active, chosen.tolist(), tokens, limits)
            yield tokens
            if not keep:
                return
            rows = torch.tensor(keep, device=mask.device)
            if len(keep) < len(active):
                active = [active[row] for row in keep]
                cache.batch_select_indices(rows)
            with torch.inference_mode():
                inputs = self._table(chosen[rows])[:, None]
            positions = positions[rows, -1:] + 1
            mask = torch.cat([mask[rows], mask.new_ones(len(keep), 1)], dim=1)

    def _take(
        self,
        active: list[int],
        chosen: list[int],
        tokens: list[list[int]],
        limits: Sequence[int],
    ) -> list[int]:
        """Notes the chosen tokens; returns the places in the batch that go on."""
        keep = []
        for place, (row, token) in enumerate(zip(active, chosen, strict=True)):
            reason = self._translator.stops(tokens[row], token, limits[row])
            if reason != "end":
                tokens[row].append(token)
            self.reasons[row] = reason
            if not reason:
                keep.append(place)
        return keep


def open_torch(path: Any, **options: Any) -> TorchTranslator:
    """Loads a model directory and translates with it; options as in `halve.models.load_model`."""
    from halve.models import load_model

    return TorchTranslator(load_model(path, **options))
