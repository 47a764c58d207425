"""The training loop: small, deterministic, and able to go on after a kill with the same bytes.

Nothing depends on what happened before a step but the weights, the optimiser and the step's number: each
epoch's order and each step's random choices are drawn from the seed and that number. A run resumed from a
checkpoint therefore does exactly what the undisturbed one does, and when checkpoints are written does not
matter.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from compress.checkpoints import (
    RunState,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from compress.collate import TrainingSequence, plan_epoch
from compress.config import TrainingConfig
from compress.gradients import SEEDS, GradientMaker, SoftLoss, all_threads, gradient_threads
from compress.parallel import Team
from compress.states import AudioStates
from halve.errors import InputError
from halve.models import SpeechModel
from halve.progress import SILENT, Progress

BETAS = (0.9, 0.98)
_LOSS_MEMORY = 0.98
"""Share of the shown loss that comes from earlier steps."""

Scores = dict[str, float]


@dataclass
class Training:
    """Everything that a run needs."""

    speech: SpeechModel
    config: TrainingConfig
    sequences: Sequence[TrainingSequence]
    audio: AudioStates
    weights: dict[str, Parameter]
    """What trains, by name: what checkpoints hold."""
    folder: Path
    """Where checkpoints go."""
    evaluate: Callable[[], Scores] | None = None
    """Scores the model as it is: by language."""
    score_start: bool = False
    """Let the untrained state compete for the best."""
    projector: frozenset[str] = frozenset()
    """Names of weights with the projector's learning rate."""
    soft: SoftLoss | None = None
    """What else than the rows' own tokens is learnt."""
    autocast: bool = False
    """Compute in bfloat16 over weights of another type."""
    max_minutes: float | None = None
    projector_factor: float = 1.0
    projector_only_steps: int = 0
    team: Team = field(default_factory=Team)
    """Who trains along; only the main process scores and writes."""
    plans: dict[int, list[list[int]]] = field(default_factory=dict)


def learning_rate_factor(config: TrainingConfig, fraction: float) -> float:
    """The learning rate as a share of its peak, at a fraction of the run from 0 to 1."""
    if fraction < config.warmup:
        return fraction / config.warmup
    if config.schedule == "constant":
        return 1.0
    rest = min(1.0, (fraction - config.warmup) / (1.0 - config.warmup))
    return 0.5 * (1 + math.cos(math.pi * rest)) if config.schedule == "cosine" else 1.0 - rest


def train(training: Training, progress: Progress = SILENT) -> RunState:
    """Trains, and leaves the best weights in the model.

    The best are those with the highest mean score, the last where nothing is scored. Goes on from a
    checkpoint in `training.folder` if there is one.

    Raises:
        InputError: the loss is no longer a number.
    """
    optimizer = _optimizer(training)
    state = load_checkpoint(training.folder, training.weights, optimizer)
    training.team.wait()  # nobody writes before all have read
    total = _total_steps(training)
    if not training.team.is_main:
        state.history = [{}]
    if state.step == 0 and training.score_start and not state.history:
        _record(training, state, optimizer, 0.0)
    _tell_of_idle(training, progress)
    if not state.finished:
        with (
            gradient_threads(training.speech.device, _may_split(training)) as (pool, threads),
            progress.task("Training", total, state.step) as advance,
        ):
            maker = _gradient_maker(training, pool, threads)
            _steps(training, maker, state, optimizer, total, advance)
    if training.team.is_main and state.best_step is not None and state.best_step != state.step:
        load_best(training.folder, state.best_step, training.weights)
    return state


def _tell_of_idle(training: Training, progress: Progress) -> None:
    """Says where batches are of fewer sequences than there are processes: some have nothing to do."""
    if training.team.size == 1:
        return
    plan = _plan(training, 0)
    idle = sum(len(numbers) < training.team.size for numbers in plan)
    if idle > len(plan) // 2:
        progress.warn(
            f"{idle} of {len(plan)} batches have fewer clips than there are processes, since a clip's texts stay together: "
            "raise --batch-size, or --no-share-audio"
        )


def _may_split(training: Training) -> bool:
    drops = [
        module.p for module in training.speech.model.modules() if isinstance(module, nn.Dropout)
    ]
    # Stock decoders drop with functions too, as their configs say: attention_dropout, decoder_layerdrop, ...
    # The tower never does: see `set_training`.
    config = training.speech.part(training.speech.family.decoder).config
    drops += [value for name, value in vars(config).items() if "drop" in name and value]
    return not any(drops) and not training.config.checkpoint_activations


def _gradient_maker(
    training: Training, pool: ThreadPoolExecutor | None, threads: int
) -> GradientMaker:
    return GradientMaker(
        speech=training.speech,
        audio=training.audio,
        weights=list(training.weights.values()),
        label_smoothing=training.config.label_smoothing,
        spec_mask=training.config.spec_mask,
        autocast=training.autocast,
        pool=pool,
        threads=threads,
        team=training.team,
        soft=training.soft,
        rows_at_once=training.config.rows_at_once,
    )


def _steps(
    training: Training,
    maker: GradientMaker,
    state: RunState,
    optimizer: torch.optim.Optimizer,
    total: int,
    advance: Callable[..., None],
) -> None:
    config = training.config
    shown = math.nan
    set_training(training.speech, True)
    for epoch, numbers, last_of_epoch in _batches(training, state.step, total):
        started = time.monotonic()
        if training.max_minutes is not None:
            # By clocks of their own the processes would take steps of different sizes, and drift apart.
            state.elapsed_s = training.team.same(state.elapsed_s)
        fraction = _fraction(training, state, total)
        loss = _step(training, maker, optimizer, state.step, numbers, fraction)
        state.step += 1
        state.loss_sum += loss
        state.loss_steps += 1
        state.elapsed_s += time.monotonic() - started
        shown = loss if math.isnan(shown) else _LOSS_MEMORY * shown + (1 - _LOSS_MEMORY) * loss
        done = training.team.agree(state.step >= total or _time_is_up(training, state))
        every = config.eval_every
        due = state.step % every == 0 if every else last_of_epoch
        if due or done:
            with all_threads(maker.threads):
                _record(training, state, optimizer, epoch + 1, finished=done)
            state.finished = training.team.agree(state.finished)
        elif state.step % config.checkpoint_every == 0 and training.team.is_main:
            save_checkpoint(training.folder, state, training.weights, optimizer)
        advance(1, note=_note(state, shown))
        if state.finished:
            return


def _step(
    training: Training,
    maker: GradientMaker,
    optimizer: torch.optim.Optimizer,
    step: int,
    numbers: Sequence[int],
    fraction: float,
) -> float:
    """One optimiser step; returns its loss."""
    config = training.config
    for group in optimizer.param_groups:
        waits = step < training.projector_only_steps and not group["is_projector"]
        factor = 0.0 if waits else learning_rate_factor(config, fraction)
        group["lr"] = group["peak"] * factor
    seed = config.seed * 1_000_003 + step
    # For dropout: each process draws for itself.
    torch.manual_seed((seed * training.team.size + training.team.rank) % SEEDS)
    value = maker.accumulate([training.sequences[number] for number in numbers], seed)
    weights = training.weights.values()
    if config.clip_norm:
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.clip_norm))
    else:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
    # Before the step: no checkpoint ever holds what it would make of the weights.
    for what, number in (("loss", value), ("gradients' norm", norm)):
        if not math.isfinite(number):
            raise InputError(
                f"The {what} of step {step + 1} is {number}",
                expected="a finite number",
                mend="lower the learning rate, or train with precision float32",
            )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def _record(
    training: Training,
    state: RunState,
    optimizer: torch.optim.Optimizer,
    epoch: float,
    finished: bool = False,
) -> None:
    """Scores the model, adds a line to the history, keeps a new best, and writes a checkpoint."""
    if not training.team.is_main:
        return
    line: dict[str, Any] = {"step": state.step, "epoch": epoch}
    if state.loss_steps:
        line["loss"] = state.loss_sum / state.loss_steps
        line["learning_rate"] = max(group["lr"] for group in optimizer.param_groups)
    state.loss_sum, state.loss_steps = 0.0, 0
    if training.evaluate is not None:
        set_training(training.speech, False)
        scores = training.evaluate()
        set_training(training.speech, True)
        line |= {"scores": scores, "score": sum(scores.values()) / len(scores)}
        _keep_best(training, state, line["score"])
    state.history.append(line)
    patience = training.config.patience
    state.finished = finished or (patience is not None and state.since_best >= patience)
    save_checkpoint(training.folder, state, training.weights, optimizer)


def _keep_best(training: Training, state: RunState, score: float) -> None:
    if state.best_score is not None and score <= state.best_score:
        state.since_best += 1
        return
    state.best_score, state.best_step, state.since_best = score, state.step, 0
    save_best(training.folder, state.step, training.weights)


def _note(state: RunState, loss: float) -> str:
    note = f"loss {loss:.3f}"
    if state.history and "score" in state.history[-1]:
        scores = state.history[-1]["scores"]
        note += ", " + ", ".join(f"{lang} {score:.1f}" for lang, score in scores.items())
    return note


def _plan(training: Training, epoch: int) -> list[list[int]]:
    if epoch not in training.plans:
        lengths = [
            training.audio.lengths[sequence.segment] + sequence.text_length
            for sequence in training.sequences
        ]
        rows = [len(sequence.branches) for sequence in training.sequences]
        seed = training.config.seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(seed % SEEDS)
        training.plans.clear()
        training.plans[epoch] = plan_epoch(lengths, rows, training.config.batch_size, generator)
    return training.plans[epoch]


def _total_steps(training: Training) -> int:
    """Steps in all. How rows fall into batches differs a little from epoch to epoch."""
    total = 0
    for epoch in range(training.config.epochs):
        total += len(_plan(training, epoch))
        if training.config.max_steps is not None and total >= training.config.max_steps:
            return training.config.max_steps
    return total


def _batches(training: Training, done: int, total: int) -> Iterator[tuple[int, list[int], bool]]:
    """Epoch, sequence numbers, and whether the batch ends the epoch, from step `done` on."""
    first = 0
    for epoch in range(training.config.epochs):
        plan = _plan(training, epoch)
        for place, numbers in enumerate(plan):
            if done <= first + place < total:
                yield epoch, numbers, place + 1 == len(plan)
        first += len(plan)


def _fraction(training: Training, state: RunState, total: int) -> float:
    by_steps = state.step / total
    if training.max_minutes is None:
        return by_steps
    return max(by_steps, min(1.0, state.elapsed_s / (60 * training.max_minutes)))


def _time_is_up(training: Training, state: RunState) -> bool:
    return training.max_minutes is not None and state.elapsed_s >= 60 * training.max_minutes


def _optimizer(training: Training) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay, the projector may learn faster."""
    config = training.config
    groups: dict[tuple[bool, bool], list[Parameter]] = {}
    for name, parameter in training.weights.items():
        # Norms of queries and keys may have a row a head.
        decays = parameter.dim() > 1 and not name.endswith("norm.weight")
        groups.setdefault((name in training.projector, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": config.learning_rate * (training.projector_factor if projector else 1.0),
                "is_projector": projector,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (projector, decays), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=BETAS,
        fused=True,
    )


def set_training(speech: SpeechModel, training: bool) -> None:
    """Dropout and activation checkpoints are for the decoder alone: the tower always runs in eval mode."""
    speech.model.eval()
    speech.part(speech.family.decoder).train(training)


def checkpoint_activations(speech: SpeechModel) -> None:
    """Lets the decoder compute its activations again in the backward pass."""
    decoder = speech.part(speech.family.decoder)
    decoder.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}
    )
