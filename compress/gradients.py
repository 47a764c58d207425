"""Loss and gradients of a batch.

On a CPU a small model loses half of its time where threads wait for each other inside every operation. A
batch is therefore split by sequences over as many threads as torch has, each computing alone; their
gradients are summed in a fixed order, so that a run depends on the number of threads and on nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from compress.attention import training_attention
from compress.collate import Batch, TrainingSequence, collate, span_mask
from compress.parallel import Team
from compress.states import AudioStates
from halve import environment
from halve.json_files import read_json, write_json
from halve.models import SpeechModel, pick_device
from halve.progress import SILENT, Progress


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """The loss of logits, (targets, vocabulary), summed over the batch's target tokens."""
    return functional.cross_entropy(
        logits.float(),
        batch.labels.to(logits.device),
        label_smoothing=label_smoothing,
        reduction="sum",
    )


def target_logits(speech: SpeechModel, batch: Batch, states: Tensor) -> Tensor:
    """The logits that predict each target token, (targets, vocabulary).

    Args:
        states: tower states of all sequences, one after the other: (audio positions, width); as many for
            each where layers attend to an encoder; empty for a model that reads, whose texts stand in the
            prompts.
    """
    family, model = speech.family, speech.model
    embeds = family.embed(model, batch.ids)
    beside: dict[str, Tensor] = {}
    if family.attends_to_encoder:
        heard = family.project(model, states)
        beside = family.conditions(heard.reshape(len(batch.ids), -1, heard.shape[-1]).unbind())
    elif family.reads == "audio":
        audio = family.project(model, states)
        # Where layers are spread over GPUs, the projector may be on another than the embeddings.
        embeds = embeds.masked_scatter(
            batch.is_audio[..., None], audio.to(embeds.device, embeds.dtype)
        )
    hidden = speech.part(family.decoder)(
        **family.decoder_inputs(model, embeds),
        attention_mask=family.attention_masks(model, batch.mask, batch.positions),
        # Without a mask, stock code would look for packed rows in the position ids.
        position_ids=None if batch.mask is None else batch.positions,
        use_cache=False,
        **beside,
    ).last_hidden_state
    # The head sees the learnt positions only: a vocabulary of 156,000 makes the rest unaffordable.
    # Where layers are spread over GPUs, the last one holds these states.
    return family.logits(model, hidden.flatten(0, 1)[batch.places.to(hidden.device)])


SEEDS = 2**63
"""Torch takes seeds below this; those that are made of a run's seed and a step can be greater."""

SoftLoss = Callable[[Tensor, Tensor, Sequence[TrainingSequence]], Tensor]
"""Makes the loss that is learnt of the cross entropy, the logits and the sequences that they belong to."""


@dataclass(frozen=True)
class GradientMaker:
    """Computes gradients, in one thread or several."""

    speech: SpeechModel
    audio: AudioStates
    weights: Sequence[Parameter]
    label_smoothing: float
    spec_mask: float
    autocast: bool
    pool: ThreadPoolExecutor | None
    threads: int
    team: Team = field(default_factory=Team)
    soft: SoftLoss | None = None
    rows_at_once: int | None = None

    def accumulate(self, sequences: Sequence[TrainingSequence], seed: int) -> float:
        """Sets the weights' gradients of the mean loss over the target tokens; returns that loss.

        Args:
            seed: decides what `spec_mask` blanks.
        """
        count = sum(len(branch.target) for each in sequences for branch in each.branches)
        loss, gradients = self._own(self.team.share(sequences), seed * self.team.size, count)
        loss = self.team.sum(loss, gradients, self.weights)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        return loss

    def _own(
        self, sequences: Sequence[TrainingSequence], seed: int, count: int
    ) -> tuple[float, list[Tensor | None]]:
        """Loss and gradients of this process's sequences, as shares of the whole batch's."""
        if not sequences:
            return 0.0, [None] * len(self.weights)
        # Sorted by length, every second (third, …) sequence makes parts of like size.
        parts = [part for n in range(self.threads) if (part := sequences[n :: self.threads])]
        first = (seed + self.team.rank) * self.threads
        seeds = [first + n for n in range(len(parts))]
        with training_attention(self.speech):
            run = map if self.pool is None else self.pool.map
            # Parts are in memory at once.
            most = None if self.rows_at_once is None else max(1, self.rows_at_once // len(parts))
            results = list(run(self._part, parts, seeds, repeat(count), repeat(most)))
        loss, gradients = results[0]
        for more_loss, more in results[1:]:
            loss += more_loss
            gradients = [_sum(one, other) for one, other in zip(gradients, more, strict=True)]
        return loss, gradients

    def _part(
        self, sequences: Sequence[TrainingSequence], seed: int, count: int, rows: int | None
    ) -> tuple[float, list[Tensor | None]]:
        generator = torch.Generator().manual_seed(seed % SEEDS)
        total = 0.0
        summed: list[Tensor | None] = [None] * len(self.weights)
        for piece in pieces(sequences, rows):
            loss = self._loss(sequences[piece], generator) / count
            gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
            total += loss.item()
            summed = [_sum(one, other) for one, other in zip(summed, gradients, strict=True)]
        return total, summed

    def _loss(self, sequences: Sequence[TrainingSequence], generator: torch.Generator) -> Tensor:
        """The loss summed over the target tokens of some sequences."""
        # Not in bfloat16: a tower that trains computes in the numbers of its weights (stock code's features want float32).
        clips = [self.audio.read(sequence.segment) for sequence in sequences]
        lengths = [len(clip) for clip in clips]
        states = torch.cat(clips)
        if self.spec_mask:
            blank = span_mask(lengths, self.spec_mask, generator).to(states.device)
            states = states.masked_fill(blank[:, None], 0.0)
        # An encoder's states are attended to from beside: they take no positions of the decoder's.
        apart = self.speech.family.attends_to_encoder
        batch = collate(sequences, [0] * len(lengths) if apart else lengths)
        batch = batch.to(self.speech.device)
        with autocast(self.speech.device, self.autocast):
            logits = target_logits(self.speech, batch, states)
            loss = cross_entropy(logits, batch, self.label_smoothing)
            return loss if self.soft is None else self.soft(loss, logits, sequences)


def pieces(sequences: Sequence[TrainingSequence], rows: int | None) -> list[slice]:
    """Consecutive sequences with at most so many rows together, or one alone that has more; all where None."""
    found, start, held = [], 0, 0
    for place, sequence in enumerate(sequences):
        count = len(sequence.branches)
        if rows is not None and held and held + count > rows:
            found.append(slice(start, place))
            start, held = place, 0
        held += count
    return [*found, slice(start, len(sequences))]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one.add_(other)


@contextmanager
def gradient_threads(device: str, apart: bool) -> Iterator[tuple[ThreadPoolExecutor | None, int]]:
    """A pool of single-threaded workers and their number, if the device is a CPU with several threads.

    Args:
        apart: whether the work may be split at all: dropout in threads would draw in no fixed order.
    """
    threads = torch.get_num_threads()
    if not apart or threads == 1 or torch.device(device).type != "cpu":
        yield None, 1
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        torch.set_num_threads(1)
        try:
            yield pool, threads
        finally:
            torch.set_num_threads(threads)


@contextmanager
def all_threads(count: int) -> Iterator[None]:
    """Inside `gradient_threads`, for work that is not split: operations use `count` threads again."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def arithmetic(asked: str, device: str, progress: Progress = SILENT) -> str:
    """The number format that training computes in on a device: float32 or bfloat16.

    Args:
        asked: float32, bfloat16, or auto.
        device: as the command line names it.
    """
    found = environment.quick_dtype(pick_device(device)) if asked == "auto" else asked
    if asked == "auto" and found == "float32":
        progress.message("Computing in float32: this processor has no units for bfloat16")
    return found


_BEGUN_IN = "arithmetic.json"


def settled(found: str, work: Path, progress: Progress) -> str:
    """The number format that a run was begun in: one that goes on elsewhere keeps it.

    Args:
        found: what it would be begun in here.
        work: the resume state's folder.
    """
    path = work / _BEGUN_IN
    if path.is_file():
        begun: str = read_json(path)
        if begun != found:
            progress.warn(
                f"Begun in {begun}, where this machine would take {found}: it goes on in {begun}"
            )
        return begun
    return found


def settle(computed: str, work: Path) -> None:
    """Notes what a run is begun in, once nothing can refuse it any more."""
    write_json(work / _BEGUN_IN, computed)


def autocast(device: str, enabled: bool) -> AbstractContextManager[Any]:
    """Arithmetic in bfloat16 where it is safe. Weights are used once a pass: casts need no cache."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=False)
