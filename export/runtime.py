"""Opening anything that translates, and translating with an ONNX package.

An ONNX package needs numpy, onnxruntime and tokenizers; neither torch nor transformers is imported.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.manifest import MANIFEST, Manifest, read_manifest
from halve import environment
from halve.errors import ArtefactError, InputError, MissingExtraError
from halve.families import Source, SourceText
from halve.languages import language
from halve.sources import limits_for
from halve.translate import TextStream, Translation, Translator

FloatArray = NDArray[np.float32]

# An encoder position pools two of the convolutions' outputs, which takes three frames.
SHORTEST_FRAMES = 3


def _never() -> bool:
    return False


class OnnxTranslator:
    """Translates with an ONNX package."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        stop_loops: bool = False,
        device: str = "auto",
    ) -> None:
        """Opens a package.

        Args:
            threads: of each graph; None leaves the choice to onnxruntime.
            device: cpu or cuda; auto is cuda for a package of precision fp16 where there is one.
            stop_loops: cuts repetition loops before their limit; scores are made without it.

        Raises:
            ArtefactError: files are missing or damaged.
            InputError: a device that this package or this machine has not.
            MissingExtraError: onnxruntime is not installed.
        """
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            raise MissingExtraError("onnxruntime", "cpu") from None
        manifest = read_manifest(path, "onnx")
        self.device = _pick_device(path, manifest, device)
        self.manifest = manifest
        self.family = manifest.family
        self.languages = tuple(manifest.languages)
        self.max_audio_s = manifest.max_audio_s
        self.sample_rate_hz = manifest.sample_rate_hz
        try:
            self._open(path, manifest, threads, stop_loops)
        except Exception as error:  # onnxruntime and tokenizers raise kinds of their own
            raise ArtefactError(
                f"{path}: the package cannot be opened ({str(error).splitlines()[0][:200]})",
                mend="look at it with `halve inspect`, then copy or make it again",
            ) from None

    def _open(self, path: Path, manifest: Manifest, threads: int | None, stop_loops: bool) -> None:
        from tokenizers import Tokenizer

        from export.decoding import Decoder, open_session
        from export.embeddings import EmbeddingTable
        from export.frontend import FrontEnd
        from export.vocabulary import VOCABULARY

        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        if manifest.reads == "audio":
            self._front = FrontEnd(manifest.front_end)
            self._encoder = open_session(
                path / "encoder.onnx", threads, spin=False, device=self.device
            )
        session = open_session(path / "decoder.onnx", threads, spin=True, device=self.device)
        kept = None
        if manifest.is_trimmed:
            kept = np.load(path / VOCABULARY, allow_pickle=False).astype(np.int64)
        self._embed = EmbeddingTable(path, manifest.embedding_bits, manifest.decoder.hidden, kept)
        self._decoder = Decoder(
            session, manifest.decoder, self._embed, manifest.end_ids, stop_loops, kept
        )
        self._prompts: dict[str, tuple[FloatArray, FloatArray]] = {}

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
        embeddings: FloatArray = self._encoder.run(["embeddings"], feed)[0]
        return embeddings[0]

    def inputs(self, audio: Source, lang: str) -> FloatArray:
        """Embeddings of the whole prompt with one clip, or text, in it, (positions, hidden)."""
        if isinstance(audio, SourceText):
            return self._embed(self._prompt_with(audio.text, lang))
        before, after = self.prompt(lang)
        return np.concatenate([before, self.encode(audio), after])

    def _prompt_with(self, text: str, lang: str) -> list[int]:
        self.prompt(lang)  # refuses a language that the package was not made for
        before, after = self.manifest.template[language(lang).code]
        ids: list[int] = self._tokenizer.encode(
            f"{before}{text.strip()}{after}", add_special_tokens=self.manifest.begins
        ).ids
        return ids

    def open_batch(self, slots: int, capacity: int = 512) -> Any:
        """A `DecodeBatch` for a server: rows are added and removed between steps.

        Add a clip with ``batch.add(translator.inputs(audio, lang), limit)``; every ``batch.step()``
        gives each row a token and returns the rows that stopped.
        """
        from export.decoding import DecodeBatch

        return DecodeBatch(self._decoder, slots, capacity)

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
        order = sorted(range(len(audio)), key=lambda index: (-len(audio[index]), index))
        waiting = deque(order)
        batch = self.open_batch(max(1, min(batch_size, len(audio))))
        running: dict[int, int] = {}
        while (waiting or running) and not cancelled():
            stopped = batch.step()
            while waiting and batch.free and not cancelled():
                index = waiting.popleft()
                row = batch.add(self.inputs(audio[index], lang), chosen[index])
                running[id(row)] = index
                if row.stopped:
                    stopped.append(row)
            for row in stopped:
                yield running.pop(id(row)), self._translation(row)

    def top_two_gap(self, audio: Source, lang: str, tokens: Sequence[int]) -> float:
        """The difference of the two highest logits after `tokens` have been said."""
        inputs = self.inputs(audio, lang)
        if tokens:
            inputs = np.concatenate([inputs, self._embed(tokens)])
        logits = self.open_batch(1, len(inputs) + 1).logits_after(inputs)
        second, best = np.partition(logits, -2)[-2:]
        return float(best - second)

    def _translation(self, row: Any) -> Translation:
        return Translation(self.text(row.tokens), list(row.tokens), row.stopped)

    def stream(
        self, audio: Source, lang: str, *, limit: int | None = None
    ) -> Generator[str, None, Translation]:
        """See `Translator.stream`; the generator's value is the whole translation."""
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
        """Frees the graphs."""
        self._prompts.clear()
        if self.manifest.reads == "audio":
            del self._encoder
        del self._decoder, self._embed


def _pick_device(path: Path, manifest: Manifest, device: str) -> str:
    """cpu or cuda.

    Raises:
        InputError: cuda for a package or a machine that cannot.
    """
    import onnxruntime

    fit = manifest.precision == "fp16"
    there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "auto":
        return "cuda" if fit and there else "cpu"
    if device == "cpu":
        return device
    if device != "cuda" or not fit:
        raise InputError(
            f"{path} ({manifest.precision}) cannot run on {device}",
            expected="the CPU; of ONNX packages, only those of precision fp16 run on a GPU (cuda)",
            mend="package the student with --precision fp16, or use a package of target checkpoint",
        )
    if not there:
        found = ", ".join(onnxruntime.get_available_providers())
        raise InputError(
            f"This onnxruntime cannot compute on a GPU (it has {found})",
            expected="onnxruntime-gpu, whose files exclude onnxruntime's",
            mend="install halve with the extra gpu instead of cpu, or name --device cpu",
        )
    return device


def open_translator(
    path: str | Path,
    *,
    threads: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Translator:
    """Opens a package of any target, a student, a teacher, a model directory or a hub id.

    Args:
        threads: threads to compute with; None leaves the choice to the runtime.
        device: auto, cpu or cuda; an ONNX package of precision fp16 runs on both, others on the CPU.
        dtype: float32, bfloat16 or float16 of a model on torch; its package's own where None.

    Raises:
        ArtefactError: not there, damaged, or of a newer halve.
        InputError: a device or type that this package has not.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        return _open_torch(path, threads, device, dtype or "float32")
    manifest = read_manifest(folder)
    if manifest.target == "onnx":
        computes = "float16" if manifest.precision == "fp16" else "float32"
        if dtype not in (None, computes):
            raise InputError(f"{path} cannot compute in {dtype}", expected=computes)
        return OnnxTranslator(folder, threads=threads, device=device)
    translator = _open_torch(path, threads, device, dtype or "bfloat16")
    translator.languages = tuple(manifest.languages)
    return translator


def _open_torch(path: str | Path, threads: int | None, device: str, dtype: str) -> Any:
    try:
        from halve.models import load_model
        from halve.translate import TorchTranslator
    except ImportError:
        raise MissingExtraError("torch", "cpu") from None
    if threads:
        environment.pin_threads(threads)
    return TorchTranslator(load_model(path, dtype=dtype, device=device))
