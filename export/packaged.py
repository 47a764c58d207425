"""Translating with a package whose prompt and audio become embeddings here, whatever runs its decoder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.ahead import working_ahead
from export.blocks import leaves_one
from export.manifest import Manifest
from export.rows import Decoder, RowBatch
from export.vocabulary import VOCABULARY, Vocabulary
from halve import environment
from halve.errors import ArtefactError, InputError
from halve.families import Source, SourceText
from halve.languages import language
from halve.sources import limits_for, source_language
from halve.translate import TextStream, Translation

FloatArray = NDArray[np.float32]

# An encoder position pools two of the convolutions' outputs, which takes three frames.
SHORTEST_FRAMES = 3


def _never() -> bool:
    return False


def _stamps(path: Path) -> list[tuple[int, int]]:
    """What tells an encoder's files from others of their names."""
    files = [path / "encoder.onnx", path / "encoder.bin"]
    return [
        (found.st_dev, found.st_ino) for found in (file.stat() for file in files if file.is_file())
    ]


def cannot_be_opened(path: Path, error: Exception) -> ArtefactError:
    """What a user reads where a runtime cannot load a package's files."""
    said = str(error).splitlines() or [type(error).__name__]
    if any(word in str(error).lower() for word in ("failed to allocate", "out of memory")):
        return ArtefactError(
            f"{path}: there is no memory to open the package in ({said[0][:200]})",
            mend="free some, or hide the GPU with CUDA_VISIBLE_DEVICES= before the command",
        )
    return ArtefactError(
        f"{path}: the package cannot be opened ({said[0][:200]})",
        mend="look at it with `halve inspect`, then copy or make it again",
    )


class PackagedTranslator(ABC):
    """Translates with a package; a subclass opens its decoder.

    The audio encoder is an ONNX graph in all of them: the whole of it is computed once a clip.
    """

    _decoder: Decoder
    _embed: Callable[[Sequence[int]], FloatArray]

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.family = manifest.family
        self.languages = tuple(manifest.languages)
        self.max_audio_s = manifest.max_audio_s
        self.sample_rate_hz = manifest.sample_rate_hz
        self._prompts: dict[str, tuple[FloatArray, FloatArray]] = {}

    @abstractmethod
    def open_batch(self, slots: int, capacity: int = 512) -> RowBatch:
        """Rows for a server: they are added and removed between steps.

        Add a clip with ``batch.add(translator.inputs(audio, lang), limit)``; every ``batch.step()``
        gives each row a token and returns the rows that stopped.
        """

    def _open_front(self, path: Path, threads: int | None, device: str = "cpu") -> None:
        """Opens what makes embeddings of audio, and the tokenizer."""
        from tokenizers import Tokenizer

        from export.decoding import open_session
        from export.frontend import FrontEnd

        self._path, self._lock = path, Lock()
        self._made = _stamps(path)
        self._single: Any = None
        self._threads = threads or environment.cores()
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        # Some were saved with either, which stock code sets aside whenever it tokenises.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if self.manifest.reads == "audio":
            self._front = FrontEnd(self.manifest.front_end)
            self._encoder = open_session(path / "encoder.onnx", threads, spin=False, device=device)

    def _kept(self, path: Path) -> Vocabulary:
        """What the package's tables and logits stand for: all tokens, or those that trimming kept."""
        facts = self.manifest
        kept = None
        if facts.is_trimmed:
            kept = np.load(path / VOCABULARY, allow_pickle=False).astype(np.int64)
        return Vocabulary(kept, facts.suppressed_ids, facts.suppressed_first_ids)

    def prompt(self, lang: str) -> tuple[FloatArray, FloatArray]:
        """Embeddings of the prompt before and after the audio, each (tokens, hidden).

        Raises:
            InputError: the package was not made for this language.
        """
        code = language(lang).code
        if code not in self.manifest.prompt:
            raise InputError(
                f"This package does not translate into {language(lang).name}",
                expected=f"one of {', '.join(self.languages)}",
                mend="name one of these, or make the package again with this language",
            )
        if code not in self._prompts:
            before, after = self.manifest.prompt[code]
            self._prompts[code] = (self._embed(before), self._embed(after))
        return self._prompts[code]

    def encode(self, audio: FloatArray) -> FloatArray:
        """The decoder's inputs for one clip, (positions, hidden).

        Raises:
            InputError: the clip is empty.
        """
        from export.frontend import encoder_positions

        if not len(audio):
            raise InputError("The audio holds no samples")
        shortest = SHORTEST_FRAMES * self.manifest.front_end.hop_samples
        if len(audio) < shortest:
            audio = np.pad(audio, (0, shortest - len(audio)))
        features, frames = self._front(audio)
        positions = np.array([encoder_positions(frames)], np.int64)
        feed = {"features": features[None], "positions": positions}
        encoder = self._encoder_for(int(positions[0]))
        embeddings: FloatArray = encoder.run(["embeddings"], feed)[0]
        return embeddings[0]

    def _encoder_for(self, positions: int) -> Any:
        """The encoder's session; of one thread for the few lengths at which several would give other bits."""
        pooled = positions // 2
        few_bits = self.manifest.encoder_bits < 16
        if not few_bits or self._threads == 1 or not (leaves_one(positions) or leaves_one(pooled)):
            return self._encoder
        from export.decoding import open_session

        with self._lock:
            if self._single is None:
                if _stamps(self._path) != self._made:
                    return self._encoder  # made anew since, or gone: another encoder would not fit
                path = self._path / "encoder.onnx"
                self._single = open_session(path, 1, spin=False, arena=False)  # it seldom runs
        return self._single

    def inputs(self, audio: Source, lang: str) -> FloatArray:
        """Embeddings of the whole prompt with one clip, or text, in it, (positions, hidden).

        Raises:
            InputError: a language that the package does not translate into, or a text's that it does not
                translate from; an empty clip; or a trimmed vocabulary without one of a text's tokens.
        """
        return self._asked(audio if isinstance(audio, SourceText) else self.encode(audio), lang)

    def _asked(self, heard: FloatArray | SourceText, lang: str) -> FloatArray:
        """The whole prompt with a text, or a clip's embeddings, in it."""
        if isinstance(heard, SourceText):
            return self._embed(self._prompt_with(heard, lang))
        before, after = self.prompt(lang)
        return np.concatenate([before, heard, after])

    def _prompt_with(self, source: SourceText, lang: str) -> list[int]:
        self.prompt(lang)  # refuses a language that the package was not made for
        spoken = source_language(source)
        templates = self.manifest.templates[language(lang).code]
        if spoken.code not in templates:
            raise InputError(
                f"This package does not translate from {spoken.name}",
                expected=f"one of {', '.join(templates)}",
                mend="make the package again with this halve",
            )
        before, after = templates[spoken.code]
        ids: list[int] = self._tokenizer.encode(
            f"{before}{source.text.strip()}{after}", add_special_tokens=self.manifest.begins
        ).ids
        return ids

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        decoded: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return decoded.strip()

    def translate(
        self,
        audio: Sequence[Source],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
        beams: int = 1,
    ) -> list[Translation]:
        """See `Translator.translate`; with more than one beam, sources are translated one by one."""
        if beams > 1:
            pairs = zip(audio, limits_for(audio, limits), strict=True)
            return [self._search(source, lang, limit, beams) for source, limit in pairs]
        found: list[Translation | None] = [None] * len(audio)
        for index, translation in self.translate_each(
            audio, lang, limits=limits, batch_size=batch_size
        ):
            found[index] = translation
        return [translation for translation in found if translation is not None]

    def _search(self, source: Source, lang: str, limit: int, beams: int) -> Translation:
        inputs = self.inputs(source, lang)
        row = self.open_batch(beams, len(inputs) + limit).search(inputs, limit, beams)
        return self._translation(row)

    def translate_each(
        self,
        audio: Sequence[Source],
        lang: str,
        *,
        limits: Sequence[int] | None = None,
        batch_size: int = 16,
        cancelled: Callable[[], bool] = _never,
    ) -> Iterator[tuple[int, Translation]]:
        """Yields each clip's index and translation as soon as it is done, longest clips first.

        A clip joins the batch when another leaves it. `cancelled` is asked before every step; once it
        says yes, nothing more comes.
        """
        chosen = limits_for(audio, limits)
        if audio:
            self.prompt(lang)  # refuses an unknown language before anything is encoded
        order = sorted(range(len(audio)), key=lambda index: (-len(audio[index]), index))
        batch = self.open_batch(max(1, min(batch_size, len(audio))))
        running: dict[int, int] = {}
        with working_ahead(partial(self._heard, audio), order, self._encoders(audio)) as waiting:
            while (waiting or running) and not cancelled():
                stopped = batch.step()
                while waiting and batch.free and not cancelled():
                    index, heard = waiting.take()
                    row = batch.add(self._asked(heard, lang), chosen[index])
                    running[id(row)] = index
                    if row.stopped:
                        stopped.append(row)
                for row in stopped:
                    yield running.pop(id(row)), self._translation(row)

    def _encoders(self, audio: Sequence[Source]) -> int:
        """How many clips are worth encoding at a time: texts are not, they are only looked up."""
        return self._threads if self.manifest.reads == "audio" and len(audio) > 1 else 1

    def _heard(self, audio: Sequence[Source], index: int) -> FloatArray | SourceText:
        source = audio[index]
        return source if isinstance(source, SourceText) else self.encode(source)

    def top_two_gap(self, audio: Source, lang: str, tokens: Sequence[int]) -> float:
        """The difference of the two highest logits after `tokens`, of what may be said; inf where only one may."""
        inputs = self.inputs(audio, lang)
        if tokens:
            inputs = np.concatenate([inputs, self._embed(tokens)])
        logits = self.open_batch(1, len(inputs) + 1).logits_after(inputs)
        self._decoder.block(logits, first=not tokens)
        second, best = np.partition(logits, -2)[-2:]
        return float(best - second)

    def _translation(self, row: Any) -> Translation:
        return Translation(self.text(row.tokens), list(row.tokens), row.stopped)

    def stream(
        self, audio: Source, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        """See `Translator.stream`."""
        (limit,) = limits_for([audio], None if limit is None else [limit])
        inputs = self.inputs(audio, lang)
        batch = self.open_batch(1, len(inputs) + limit)
        row = batch.add(inputs, limit)
        pieces = TextStream(self.text)
        while not row.stopped:
            if piece := pieces.push(row.tokens):
                yield piece
            batch.step()
        if piece := pieces.push(row.tokens, last=True):
            yield piece
        return self._translation(row)

    def close(self) -> None:
        """Frees the package's parts."""
        self._prompts.clear()
        if self.manifest.reads == "audio":
            del self._encoder
            self._single = None
        del self._decoder, self._embed
