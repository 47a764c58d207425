"""Translating speech or text: the protocol that every runtime fulfils, and the one on torch.

Decoding is greedy, as the paper's: the same tokens as stock `generate`, with audio encoded on its valid
frames only and finished rows leaving the batch.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from halve.audio import SAMPLE_RATE_HZ
from halve.beams import BeamSearch
from halve.families import Source, SourceText
from halve.languages import LANGUAGES
from halve.models import SpeechModel
from halve.padded import PaddedRows
from halve.sources import asked, limits_for
from halve.torch_beams import search

if TYPE_CHECKING:
    import torch

    from halve.crew import Crew

    Taken = torch.Tensor | SourceText
    """A source as `Family.take_in` gives it."""

LONG_POSITIONS = 1000
"""More than most rows take in the cache: prompt, 30 s of audio and translation."""
SMALL_CACHE_BYTES = 1 << 29
"""Two batches may be under way where the keys and values of one take no more than this."""
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
    """end: the model ended it; limit: cut at its token limit; loop: cut in a repetition; gone: nobody waits for it."""


def _nobody(_: int) -> bool:
    return False


def _asked_of(gone: Callable[[int], bool], batch: Sequence[int], row: int) -> bool:
    return gone(batch[row])


class Translator(Protocol):
    """What translates: a checkpoint on torch, an ONNX package, …"""

    family: str
    languages: tuple[str, ...]
    max_audio_s: float
    sample_rate_hz: int

    def translate(
        self,
        audio: Sequence[Source],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
        beams: int = 1,
    ) -> list[Translation]:
        """Translates clips (each of shape (samples,)), or texts where the family reads, in the given order."""
        ...

    def stream(
        self, audio: Source, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        """Translates one clip or text; what is yielded, joined, is the text that `translate` returns.

        The generator's value is the whole translation.
        """
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
        self._blocked, self._blocked_first = speech.family.suppressed(speech.model)

    def encode_all(self, audio: Sequence[Source]) -> "list[Taken]":
        """What is computed once of each source, whatever the language: see `Family.take_in`."""
        from halve.crew import Crew

        speech = self.speech
        take_in = partial(speech.family.take_in, speech.model, speech.processor)
        # On a CPU, clips side by side on a core each are encoded faster than one by one on all of them.
        most = 1 if speech.family.reads == "text" else len(audio)
        with Crew(self._device(), most) as crew:
            return crew.map(take_in, audio)

    def _device(self) -> "torch.device":
        import torch

        return torch.device(self.speech.device)

    def translate(
        self,
        audio: Sequence[Source],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
        beams: int = 1,
    ) -> list[Translation]:
        """See `Translator.translate`; every beam is a row of the batch."""
        found: dict[int, Translation] = {}
        chosen = limits_for(audio, limits)
        batches = plan_batches([len(clip) for clip in audio], max(1, batch_size // beams))
        take = partial(self._translate_batch, audio, lang, chosen, beams)
        with self.lanes(len(batches), max(batch_size, beams)) as crew:
            for batch, rows in zip(batches, crew.map(take, batches), strict=True):
                found.update(zip(batch, rows, strict=True))
        return [found[index] for index in range(len(audio))]

    def translate_while(
        self,
        audio: Sequence[Source],
        lang: str,
        *,
        limits: Sequence[int],
        gone: Callable[[int], bool],
    ) -> list[Translation]:
        """Translates one batch of sources, whose rows leave at the next step once `gone` says so.

        Args:
            gone: whether nobody waits for the source at this place any more; asked at every step.

        Returns:
            The translations in order; what has gone has stopped for that reason, wherever it was.
        """
        found = {index: Translation("", [], "gone") for index in range(len(audio))}
        waited_for = [index for index in found if not gone(index)]
        if waited_for:
            rows = self.translate_embeddings(
                self.encode_all([audio[index] for index in waited_for]),
                lang,
                limits=[limits[index] for index in waited_for],
                batch_size=len(waited_for),
                gone=lambda place: gone(waited_for[place]),
            )
            found.update(zip(waited_for, rows, strict=True))
        return [found[index] for index in range(len(audio))]

    def _translate_batch(
        self,
        audio: Sequence[Source],
        lang: str,
        limits: Sequence[int],
        beams: int,
        batch: Sequence[int],
    ) -> list[Translation]:
        embeddings = self.encode_all([audio[index] for index in batch])
        chosen = [limits[index] for index in batch]
        if beams > 1:
            found = self.hypotheses(embeddings, lang, limits=chosen, beams=beams)
            return [best for best, *_ in found]
        return self.translate_embeddings(embeddings, lang, limits=chosen, batch_size=len(batch))

    def lanes(self, batches: int, batch_size: int) -> "Crew":
        """Workers that translate batches side by side: operations on few numbers waste a second core.

        One where the cache of a batch is large.
        """
        from halve.crew import Crew

        family, model = self.speech.family, self.speech.model
        cache_bytes = 4 * family.cache_width(model) * LONG_POSITIONS * batch_size
        return Crew(self._device(), min(batches, 2 if cache_bytes <= SMALL_CACHE_BYTES else 1))

    def hypotheses(
        self, embeddings: "Sequence[Taken]", lang: str, *, limits: Sequence[int], beams: int
    ) -> list[list[Translation]]:
        """What beam searches in one batch have finished, best first: at most `beams` translations of each source."""
        searches = [
            BeamSearch(
                beams,
                limit,
                self._ends,
                loops=is_looping if self._stop_loops else None,
                blocked=(self._blocked, self._blocked_first),
            )
            for limit in limits
        ]
        search(self, embeddings, lang, searches)
        return [
            [
                Translation(self.decode(each.tokens), each.tokens, each.stopped)
                for each in found.finished
            ]
            for found in searches
        ]

    def translate_embeddings(
        self,
        embeddings: "Sequence[Taken]",
        lang: str,
        *,
        limits: Sequence[int],
        batch_size: int = 16,
        gone: Callable[[int], bool] = _nobody,
    ) -> list[Translation]:
        """Translates sources that `encode_all` has taken in; `gone` as `translate_while` takes it."""
        found: dict[int, Translation] = {}
        for batch in plan_batches([len(rows) for rows in embeddings], batch_size):
            decoding = _Decoding(self, [embeddings[index] for index in batch], lang)
            left = partial(_asked_of, gone, batch)
            tokens, reasons = decoding.run([limits[index] for index in batch], left)
            for index, row, reason in zip(batch, tokens, reasons, strict=True):
                text = self.decode(row)
                found[index] = Translation(text, row, reason)
        return [found[index] for index in range(len(embeddings))]

    def stream(
        self, audio: Source, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        """See `Translator.stream`."""
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

    def inputs(self, taken: "Taken", lang: str) -> "torch.Tensor":
        """The decoder's inputs for one source, up to the first token it says: (positions, hidden)."""
        import torch

        speech = self.speech
        instruction = asked(speech.family, lang, taken)
        with torch.inference_mode():
            return speech.family.embed_prompt(speech.model, speech.processor, instruction, taken)

    def choose(self, hidden: "torch.Tensor", first: bool) -> "torch.Tensor":
        """The most likely tokens after states (rows, hidden), of those that stock `generate` may say."""
        chosen: torch.Tensor = self.logits(hidden, first).argmax(-1)
        return chosen

    def all_logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits (rows, vocabulary) after states (rows, hidden)."""
        import torch

        with torch.inference_mode():
            return self.speech.family.logits(self.speech.model, hidden)

    def logits(self, hidden: "torch.Tensor", first: bool) -> "torch.Tensor":
        """Logits (rows, vocabulary) after states; -inf for what stock `generate` may not say."""
        logits = self.speech.family.logits(self.speech.model, hidden)
        for blocked in (self._blocked, self._blocked_first if first else ()):
            if blocked:
                logits[:, list(blocked)] = -float("inf")
        return logits

    def close(self) -> None:
        """Frees the model."""
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
        self, translator: TorchTranslator, embeddings: "Sequence[Taken]", lang: str
    ) -> None:
        self._translator = translator
        self._rows = PaddedRows(translator, embeddings, lang)

    def run(
        self, limits: Sequence[int], gone: Callable[[int], bool] = _nobody
    ) -> tuple[list[list[int]], list[str]]:
        """All rows' tokens and why each stopped."""
        tokens: list[list[int]] = [[] for _ in limits]
        for rows in self.steps(limits, gone):
            tokens = rows
        return tokens, self.reasons

    def steps(
        self, limits: Sequence[int], gone: Callable[[int], bool] = _nobody
    ) -> Iterator[list[list[int]]]:
        """Yields all rows' tokens so far after each step."""
        import torch

        tokens: list[list[int]] = [[] for _ in limits]
        self.reasons = [""] * len(limits)
        active = list(range(len(limits)))
        first = True
        while active:
            hidden = self._rows.read()
            with torch.inference_mode():
                chosen = self._translator.choose(hidden, first)
            first = False
            keep = self._take(active, chosen.tolist(), tokens, limits)
            keep = [place for place in keep if not self._left(active[place], gone)]
            yield tokens
            if not keep:
                return
            active = [active[place] for place in keep]
            self._rows.go_on(keep, chosen[keep])

    def _left(self, row: int, gone: Callable[[int], bool]) -> bool:
        if not gone(row):
            return False
        self.reasons[row] = "gone"
        return True

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
