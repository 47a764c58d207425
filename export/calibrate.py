"""What each linear layer of a student reads when it translates: the calibration that GPTQ needs.

Layers are taken in the order in which they compute. Each sees what those before it give with the weights
they will have in the package, so that a layer also makes up for the errors of earlier ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from export.cache_scales import Peaks
from export.gptq import Moments, gptq_blocks
from export.quantise import Blocks, FloatArray, quantise_blocks
from halve.corpus import Corpus, Segment, evenly, read_corpus
from halve.errors import InputError
from halve.families import Source, SourceText
from halve.models import SpeechModel
from halve.sources import read_sources
from halve.translate import TorchTranslator

if TYPE_CHECKING:
    import torch

    from halve.crew import Crew

TRAIN = "train"
_TOGETHER = 16
"""Samples whose states a linear layer reads are held at once."""
_Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with."""


class Quantiser(Protocol):
    """Quantises a weight, (rows, columns), of the linear layers with these keys, whose rows follow each other."""

    def __call__(
        self, keys: Sequence[str], weight: FloatArray, bits: int, block_size: int
    ) -> Blocks: ...


@dataclass(frozen=True)
class DataFree:
    """Quantises by the weights alone: see `fit_grid`."""

    search: bool = True
    zero_point: bool = False

    def __call__(
        self, keys: Sequence[str], weight: FloatArray, bits: int, block_size: int
    ) -> Blocks:
        """See `Quantiser`."""
        zero_point = self.zero_point and bits < 8
        return quantise_blocks(weight, bits, block_size, self.search, zero_point)


@dataclass(frozen=True)
class Sample:
    """One source, the language it is translated into, and the translation's tokens with their end."""

    source: Source
    lang: str
    tokens: list[int]


def read_samples(
    corpus_path: Path, langs: Sequence[str], speech: SpeechModel, limit: int
) -> list[Sample]:
    """Segments of `train`, spread evenly over it, in turn for each language.

    Where too few have a reference, the others' translation is the student's own.

    Raises:
        CorpusError: it has no such segments.
        InputError: `limit` is not positive.
    """
    if limit < 1:
        raise InputError(f"{limit} calibration segments", expected="at least one")
    corpus = read_corpus(corpus_path)
    share = -(-limit // len(langs))
    found: list[tuple[Segment, str]] = []
    for code in langs:
        found += [
            (segment, code) for segment in _of_train(corpus, code, share, speech.family.reads)
        ]
    found = found[:limit]
    heard = read_sources(speech.family.reads, corpus, [segment for segment, _ in found])
    said = _said(speech, found, heard)
    end = speech.family.end_ids(speech.model)[0]
    tokenizer = speech.processor.tokenizer
    return [
        Sample(source, code, [*tokenizer(text, add_special_tokens=False)["input_ids"], end])
        for source, (_, code), text in zip(heard, found, said, strict=True)
    ]


def _of_train(corpus: Corpus, code: str, share: int, reads: str) -> list[Segment]:
    """Segments with a reference, spread evenly; as far as they are too few, others beside them."""
    train = corpus.split(TRAIN)
    having = [segment for segment in train if code in segment.references]
    plain = [
        each
        for each in train
        if code not in each.references
        and each.wants(code)
        and (each.audio if reads == "audio" else each.source_text.strip())
    ]
    found = evenly(having, share)
    found += evenly(plain, share - len(found))
    if not found:
        corpus.split(TRAIN, code)  # says which languages there are
    return found


def _said(
    speech: SpeechModel, found: Sequence[tuple[Segment, str]], heard: Sequence[Source]
) -> list[str]:
    """The translation of each segment: its reference, else what the student says."""
    texts = [segment.references.get(code, "") for segment, code in found]
    translator = TorchTranslator(speech, stop_loops=True)
    for code in dict.fromkeys(code for _, code in found):
        places = [
            place
            for place, (segment, lang) in enumerate(found)
            if lang == code and code not in segment.references
        ]
        rows = translator.translate([heard[place] for place in places], code) if places else []
        for place, row in zip(places, rows, strict=True):
            texts[place] = row.text
    translator.close()
    return texts


class _Reached(Exception):
    """Ends a forward pass where what was wanted is known: what the module is given."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given = (args, kwargs)


class Calibration:
    """A student that computes on samples, layer by layer, while its weights are replaced."""

    def __init__(self, speech: SpeechModel, samples: Sequence[Sample]) -> None:
        self._speech = speech
        self._samples = samples
        self._translator = TorchTranslator(speech)
        family = speech.family
        self._stages = {family.disk_layers: _Stage(speech.part(family.layers), self._decoder_calls)}
        if family.reads == "audio":
            tower = speech.part(f"{family.audio_tower}.layers")
            self._stages[f"{family.disk_audio_tower}layers."] = _Stage(tower, self._tower_calls)

    def moments(self, key: str) -> Moments:
        """Sum of x x^T over what a linear layer reads, (columns, columns).

        Args:
            key: its weight's key on disk, without ".weight". Later layers may be asked for after
                earlier ones only.
        """
        if self._is_head(key):
            return self._head_moments()
        stage, number, name = self._place(key)
        return stage.moments(number, name)

    def cache_peaks(self) -> list[Peaks]:
        """What keys and values reach at most in each layer, with the weights that the layers have now."""
        import torch

        decoder = self._speech.part(self._speech.family.decoder)

        def peaks(inputs: "torch.Tensor") -> dict[int, Peaks]:
            noted = peak_cache()
            with torch.inference_mode():
                decoder(inputs_embeds=inputs[None], past_key_values=noted, use_cache=True)
            return noted.peaks

        with _crew_of(decoder, len(self._inputs)) as crew:
            found = crew.map(peaks, [inputs for inputs, _ in self._inputs])
        return [reduce(or_, (each[layer] for each in found)) for layer in sorted(found[0])]

    def close(self) -> None:
        """Frees the student: the stages and their calls refer to each other, and would keep it."""
        self._stages.clear()
        self.__dict__.pop("_inputs", None)
        self._translator.close()
        del self._speech

    def _is_head(self, key: str) -> bool:
        return f"{key}." == self._speech.family.disk_head

    def replace(self, keys: Sequence[str], weight: FloatArray) -> None:
        """Gives linear layers, whose rows follow each other in `weight`, the package's weights.

        The head is left as it is: nothing is computed from what it gives, and it may be trimmed.
        """
        import torch

        start = 0
        if self._is_head(keys[0]):
            return
        for key in keys:
            stage, number, name = self._place(key)
            old = stage.layers[number].get_submodule(name).weight
            new = torch.from_numpy(weight[start : start + len(old)])
            with torch.no_grad():
                old.copy_(new)
            start += len(old)

    def _place(self, key: str) -> "tuple[_Stage, int, str]":
        """Where the linear layer is: its stage, its layer's number and its name within the layer."""
        for prefix, stage in self._stages.items():
            if key.startswith(prefix):
                number, _, name = key.removeprefix(prefix).partition(".")
                return stage, int(number), name
        raise InputError(f"Layer {key} cannot be calibrated")

    def _tower_calls(self) -> list[Callable[[], Any]]:
        return [partial(self._translator.encode_all, [sample.source]) for sample in self._samples]

    def _decoder_calls(self) -> list[Callable[[], Any]]:
        decoder = self._speech.part(self._speech.family.decoder)
        return [
            partial(decoder, inputs_embeds=inputs[None], use_cache=False)
            for inputs, _ in self._inputs
        ]

    @cached_property
    def _inputs(self) -> "list[tuple[torch.Tensor, int]]":
        """Embeddings of each sample's prompt, clip and translation, (positions, hidden), and the prompt's length.

        Computed once, when the tower has the weights of the package.
        """
        taken = self._translator.encode_all([sample.source for sample in self._samples])
        return [self._embed(*each) for each in zip(self._samples, taken, strict=True)]

    def _embed(
        self, sample: Sample, taken: "torch.Tensor | SourceText"
    ) -> "tuple[torch.Tensor, int]":
        import torch

        prompt = self._translator.inputs(taken, sample.lang)
        table = self._speech.part(self._speech.family.embeddings)
        said = torch.tensor(sample.tokens[:-1], dtype=torch.long, device=prompt.device)
        with torch.inference_mode():
            return torch.cat([prompt, table(said)]), len(prompt)

    def _head_moments(self) -> Moments:
        """Of the states that choose tokens: those from the prompt's last position on."""
        import torch

        norm = self._speech.part(self._speech.family.norm)
        last = self._stages[self._speech.family.disk_layers].outputs()
        total: Moments | float = 0.0
        with torch.inference_mode():
            for states, (_, prompt) in zip(last, self._inputs, strict=True):
                total = total + _outer(norm(states)[0, prompt - 1 :])
        return np.asarray(total)


def peak_cache() -> Any:
    """A key-value cache that notes what it is given, as `peaks` by layer, and keeps none of it."""
    from transformers import DynamicCache

    class PeakCache(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.peaks: dict[int, Peaks] = {}

        def update(self, keys: Any, values: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
            states = (part[0].float().cpu().numpy() for part in (keys, values))
            self.peaks[layer_idx] = Peaks.of(*states)
            return keys, values

    return PeakCache()


class Calibrated:
    """Quantises with GPTQ, in the order in which the layers compute; 8 bits are rounded to nearest."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration

    def __call__(
        self, keys: Sequence[str], weight: FloatArray, bits: int, block_size: int
    ) -> Blocks:
        """See `Quantiser`."""
        if not keys:
            return quantise_blocks(weight, bits, block_size)
        if bits < 8:
            blocks = gptq_blocks(weight, self._calibration.moments(keys[0]), bits, block_size)
        else:
            blocks = quantise_blocks(weight, bits, block_size)
        self._calibration.replace(keys, blocks.dequantise())
        return blocks


class _Stage:
    """Layers that follow each other, and what the next of them reads of each sample."""

    def __init__(self, layers: Any, calls: Callable[[], list[Callable[[], Any]]]) -> None:
        self.layers = layers
        self._calls = calls
        self._inputs: list[_Given] | None = None
        self._next = 0

    def moments(self, number: int, name: str) -> Moments:
        """Of the linear layer `name` of layer `number`."""
        import torch

        given = self._advance(number)
        layer = self.layers[number]
        calls = [partial(layer, *args, **kwargs) for args, kwargs in given]
        total: Moments | float = 0.0
        for start in range(0, len(calls), _TOGETHER):
            reads = _caught(layer.get_submodule(name), calls[start : start + _TOGETHER])
            flat = [args[0].reshape(-1, args[0].shape[-1]) for args, _ in reads]
            total = total + _outer(torch.cat(flat))
        return np.asarray(total)

    def outputs(self) -> "list[torch.Tensor]":
        """What the last layer gives of each sample."""
        return [args[0] for args, _ in self._advance(len(self.layers))]

    def _advance(self, number: int) -> list[_Given]:
        """What layer `number` reads."""
        if self._inputs is None:
            self._inputs = _caught(self.layers[0], self._calls())
        while self._next < number:
            through = partial(_passed, self.layers[self._next])
            with _crew_of(self.layers, len(self._inputs)) as crew:
                self._inputs = crew.map(through, self._inputs)
            self._next += 1
        return self._inputs


def _passed(layer: Any, given: _Given) -> _Given:
    args, kwargs = given
    found = layer(*args, **kwargs)
    return (found[0] if isinstance(found, tuple) else found, *args[1:]), kwargs


def _crew_of(module: Any, most: int) -> "Crew":
    from halve.crew import Crew

    return Crew(next(module.parameters()).device, most)


def _caught(module: Any, calls: Sequence[Callable[[], Any]]) -> list[_Given]:
    """What each call passes to `module`; the call ends there."""

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with _crew_of(module, len(calls)) as crew:
            return crew.map(_given, calls)
    finally:
        hook.remove()


def _given(call: Callable[[], Any]) -> _Given:
    try:
        call()
    except _Reached as reached:
        return reached.given
    raise AssertionError("the call does not reach the module")


def _outer(states: "torch.Tensor") -> Moments:
    """Sum of x x^T over all positions of states, (..., columns)."""
    flat = states.reshape(-1, states.shape[-1]).float()
    found: Moments = (flat.T @ flat).cpu().numpy().astype(np.float64)
    return found
