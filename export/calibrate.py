"""What each linear layer of a student reads when it translates: the calibration that GPTQ needs.

Layers are taken in the order in which they compute. Each sees what those before it give with the weights
they will have in the package, so that a layer also makes up for the errors of earlier ones.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from export.gptq import Moments, gptq_blocks
from export.quantise import Blocks, FloatArray, quantise_blocks
from halve.corpus import Segment, read_corpus
from halve.errors import InputError
from halve.families import Source
from halve.models import SpeechModel
from halve.sources import read_source
from halve.translate import TorchTranslator

if TYPE_CHECKING:
    import torch

TRAIN = "train"


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
        found += [(segment, code) for segment in corpus.split(TRAIN, code, share)]
    end = speech.family.end_ids(speech.model)[0]
    tokenizer = speech.processor.tokenizer
    return [
        Sample(
            read_source(speech.family.reads, corpus, segment),
            code,
            [*tokenizer(segment.references[code], add_special_tokens=False)["input_ids"], end],
        )
        for segment, code in found[:limit]
    ]


class _Reached(Exception):
    """Ends a forward pass where what was wanted is known."""


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

    def _tower_calls(self) -> Iterator[Callable[[], Any]]:
        for sample in self._samples:
            yield partial(self._translator.encode_all, [sample.source])

    def _decoder_calls(self) -> Iterator[Callable[[], Any]]:
        decoder = self._speech.part(self._speech.family.decoder)
        for sample in self._samples:
            inputs, _ = self._inputs(sample)
            yield partial(decoder, inputs_embeds=inputs[None], use_cache=False)

    def _inputs(self, sample: Sample) -> "tuple[torch.Tensor, int]":
        """Embeddings of prompt, clip and translation, (positions, hidden), and the prompt's length."""
        import torch

        prompt = self._translator.inputs(
            self._translator.encode_all([sample.source])[0], sample.lang
        )
        table = self._speech.part(self._speech.family.embeddings)
        said = torch.tensor(sample.tokens[:-1], dtype=torch.long, device=prompt.device)
        with torch.inference_mode():
            return torch.cat([prompt, table(said)]), len(prompt)

    def _head_moments(self) -> Moments:
        """Of the states that choose tokens: those from the prompt's last position on."""
        import torch

        decoder = self._speech.part(self._speech.family.decoder)
        total: Moments | float = 0.0
        with torch.inference_mode():
            for sample in self._samples:
                inputs, prompt = self._inputs(sample)
                states = decoder(inputs_embeds=inputs[None], use_cache=False).last_hidden_state
                total = total + _outer(states[0, prompt - 1 :])
        return np.asarray(total)


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

    def __init__(self, layers: Any, calls: Callable[[], Iterator[Callable[[], Any]]]) -> None:
        self.layers = layers
        self._calls = calls
        self._inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        self._next = 0

    def moments(self, number: int, name: str) -> Moments:
        """Of the linear layer `name` of layer `number`."""
        self._advance(number)
        layer = self.layers[number]
        total: Moments | float = 0.0
        for args, kwargs in self._inputs or []:
            (read, *_), _ = _caught(layer.get_submodule(name), lambda: layer(*args, **kwargs))  # noqa: B023  called at once
            total = total + _outer(read)
        return np.asarray(total)

    def _advance(self, number: int) -> None:
        """Computes what layer `number` reads."""
        import torch

        if self._inputs is None:
            self._inputs = [_caught(self.layers[0], call) for call in self._calls()]
        while self._next < number:
            layer = self.layers[self._next]
            with torch.inference_mode():
                for index, (args, kwargs) in enumerate(self._inputs):
                    found = layer(*args, **kwargs)
                    states = found[0] if isinstance(found, tuple) else found
                    self._inputs[index] = ((states, *args[1:]), kwargs)
            self._next += 1


def _caught(module: Any, call: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `call` passes to `module`; the call ends there."""
    import torch

    with _catching(module) as found, torch.inference_mode(), suppress(_Reached):
        call()
    return found[0]


@contextmanager
def _catching(module: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def _outer(states: "torch.Tensor") -> Moments:
    """Sum of x x^T over all positions of states, (..., columns)."""
    flat = states.reshape(-1, states.shape[-1]).float()
    found: Moments = (flat.T @ flat).cpu().numpy().astype(np.float64)
    return found
