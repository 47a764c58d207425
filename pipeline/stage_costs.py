"""What each stage will cost here: estimates of time, memory and disk.

In one run of demo/recipe.yaml on two cores they were 1.4 (importance) to 2.5 (tune) times what the long stages took.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compress.importance import DEFAULT_BUDGET
from halve.families import Counts
from pipeline.costs import (
    POSITIONS_PER_SECOND,
    PROMPT_POSITIONS,
    TOKENS_PER_SECOND,
    Cost,
    Estimator,
    width,
)

if TYPE_CHECKING:
    from pipeline.steps import Step

AGAIN = 0.6
"""What a candidate of the exact search computes, in translations of all segments: the layers after the removed one."""
GPU_AGAIN = 0.05
"""The same on a GPU, where hundreds of rows take a step together (H200: 0.7 s a candidate of 100 segments at the 7B shape)."""
LOAD_S = 6.0
"""Starting torch and loading a small model."""
NF4_BYTES = 0.516
"""Bytes of a weight in NF4 with double quantisation: 4 bits, and 8 bits and 32 bits of scales in 64 and 16,384."""


def cost(of: Estimator, step: "Step") -> Cost:
    """The estimate for one step."""
    if step.stage == "corpus":
        count = sum(of.speech.segments.values())
        return Cost(1 + 0.002 * count, 100e6, of.speech.stored_bytes)
    if step.stage == "report":
        return Cost(5, 200e6, 5e6)
    if of.teacher is None or of.student is None:
        return Cost()
    return _COSTS[step.stage](of, step)


def _importance(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    counts = of.teacher
    assert counts is not None
    segments = of.speech.count("select", config.segments)
    one = of.translating(counts, segments, config.batch_size)
    left = [counts.decoder_layers - gone - 2 for gone in range(config.remove)]
    candidates = sum(min(config.shortlist or layers, layers) for layers in left)
    if config.method == "reference":
        time_s = candidates * of.translating(counts, segments, 1)
    elif config.method in ("exact", "bounded", "racing"):
        # Layers before a removed one are computed once: half of each candidate's work on average.
        again = of.translating(counts, segments, config.batch_size, hear=False)
        time_s = one + (GPU_AGAIN if of.on_gpu else AGAIN) * candidates * again
    else:
        time_s = one
    model = counts.total * _bytes(config.dtype)
    if config.method in ("random", "middle", "spaced"):
        return Cost(LOAD_S, 0.5e9, 1e5)
    if config.method == "reference":  # a candidate is a copy
        return Cost(LOAD_S + time_s, 0.5e9 + 2 * model, 1e5 + 200 * candidates)
    rows = min(segments, config.batch_size)
    positions = rows * (of.speech.mean_s * POSITIONS_PER_SECOND + PROMPT_POSITIONS)
    # Keys and values of the parent, of a candidate, and of the rows of five that are decoded together.
    each = 7 * 2 * width(counts) * counts.decoder_layers * _bytes(config.dtype)
    most = DEFAULT_BUDGET * of.device_bytes
    if config.memory_gb is not None:
        most = config.memory_gb * 1e9
    memory = 0.5e9 + model + min(positions * each, most)
    return Cost(LOAD_S + time_s, memory, 1e5 + 200 * candidates)


def _prune(of: Estimator, step: "Step") -> Cost:
    counts = of.student
    assert counts is not None and of.teacher is not None
    full = getattr(step.config, "verify", "") == "full"
    stored = counts.total * 2.0
    return Cost(
        2 + stored / 300e6 + (LOAD_S if full else 0), 1.5e9 + (stored * 2 if full else 0), stored
    )


def _distill(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    counts = of.teacher
    assert counts is not None
    segments = sum(
        of.speech.count(split, config.limit, config.untranslated) for split in config.splits
    )
    # Every beam is a row.
    time_s = of.translating(counts, segments * config.width, config.batch_size) * len(config.langs)
    disk = 600 * segments * config.width + (of.states_bytes(segments) if config.logits else 0)
    weights = counts.total * _bytes(config.dtype)
    positions = of.speech.mean_s * (POSITIONS_PER_SECOND + TOKENS_PER_SECOND) + PROMPT_POSITIONS
    each = 2 * width(counts) * counts.decoder_layers * _bytes(config.dtype)
    kept = min(config.batch_size, segments * config.width) * positions * each
    if of.on_gpu:  # longer batches are divided: see `compress.footprint.rows_that_fit`
        kept = min(kept, max(0.0, of.device_bytes - weights) / 3)
    return Cost(LOAD_S + time_s, 0.7e9 + weights + kept, disk)


def _adapter(counts: Counts, rank: int) -> float:
    # Seven linear layers, taken as squares of a size that gives the layer's parameters.
    width: float = (counts.per_layer / 7) ** 0.5
    return 7 * 2 * rank * width * counts.decoder_layers


def _steps_of(config: Any, rows: int) -> float:
    epochs = float(config.epochs)
    if config.max_steps is not None:
        epochs = min(epochs, config.max_steps * config.batch_size / max(1, rows))
    return epochs


def _scoring(of: Estimator, counts: Counts, config: Any, rows: int, checked: int) -> float:
    """Seconds of translating `select`: once before training, then as often as the settings say."""
    an_epoch = max(1, math.ceil(rows / config.batch_size))
    steps = math.ceil(_steps_of(config, rows) * an_epoch)
    rounds = 1 + math.ceil(steps / (config.eval_every or an_epoch))
    return rounds * of.translating(counts, checked, 16) * len(config.langs) if checked else 0.0


def _tune(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    counts = of.student
    assert counts is not None
    distilled = of.run.recipe.distill
    plain = distilled is not None and distilled.untranslated
    segments = of.speech.count("train", config.train_segments, plain)
    rows = of.speech.count("train", config.train_segments) * len(config.langs)
    rows += segments * len(config.langs) * (distilled.hypotheses if distilled else 0)
    time_s = of.training(counts, rows, _steps_of(config, rows), 6 if config.method == "full" else 4)
    checked = of.speech.count("select", config.select_segments)
    time_s += _scoring(of, counts, config, rows, checked)
    time_s += LOAD_S + segments * 2 * counts.audio_tower * of.speech.mean_s * 50 / of.flops / 0.3
    heard, kept = of.states_bytes(segments + checked), of.activations_bytes(counts, config)
    if config.method == "full":
        time_s += _checkpoints_s(config, rows, counts.total * 4)
        disk = counts.total * 2 + _resume_bytes(counts.total, 4) + heard
        return Cost(time_s, 1e9 + kept + counts.total * 16, disk)
    learnt = _adapter(counts, config.rank)
    stored = NF4_BYTES if config.method == "qlora" else 2
    frozen = counts.decoder * stored + (counts.total - counts.decoder) * 2
    disk = learnt * 4 + _resume_bytes(learnt, 4) + heard
    return Cost(time_s, 1e9 + kept + frozen + learnt * 16, disk)


CHECKPOINT_BYTES_PER_S = 400e6
"""A disk that each byte must have reached before training goes on."""


def _checkpoints_s(config: Any, rows: int, learnt_bytes: float) -> float:
    """Seconds of writing checkpoints: weights and two moments each time."""
    steps = _steps_of(config, rows) * rows / config.batch_size
    checkpoints = int(steps // config.checkpoint_every)
    return checkpoints * 3 * learnt_bytes / CHECKPOINT_BYTES_PER_S


def _resume_bytes(learnt: float, each: float) -> float:
    """What a training run keeps to go on from, of weights of so many bytes: at most three checkpoints with two
    moments, and the best weights twice while new ones take the place of old."""
    return learnt * each * (3 * 3 + 2)


def _teach(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    counts = of.teacher
    assert counts is not None
    segments = of.speech.count("train", config.train_segments)
    rows = segments * (len(config.langs) + config.transcribe)
    checked = of.speech.count("select", config.select_segments)
    lora = config.method == "lora"
    time_s = of.training(counts, rows, _steps_of(config, rows), 4 if lora else 6)
    if config.max_minutes is not None:
        time_s = min(time_s, config.max_minutes * 60)
    time_s += _scoring(of, counts, config, rows, checked)
    heard = of.states_bytes(segments + checked) if lora or config.freeze_audio else 0
    each, disk = _bytes(config.weights), counts.total * 2 + heard
    kept = of.activations_bytes(counts, config)
    if lora:
        learnt = _adapter(counts, config.rank)
        memory = 1e9 + kept + counts.total * each + 16 * learnt
        return Cost(LOAD_S + time_s, memory, disk + _resume_bytes(learnt, 4))
    time_s += _checkpoints_s(config, rows, counts.total * each)
    # Weights, gradients and two moments, each of the same precision.
    memory = 1e9 + kept + 4 * counts.total * each
    return Cost(LOAD_S + time_s, memory, disk + _resume_bytes(counts.total, each))


def _merge(of: Estimator, step: "Step") -> Cost:
    counts = of.student
    assert counts is not None
    config: Any = step.config
    stored = counts.total * 2.0
    time_s, memory = LOAD_S + 2 * stored / 200e6, 1.5e9 + of.roomy_bytes(counts)
    tune = of.run.recipe.tune
    if config.onto != "auto" or (tune is not None and tune.method == "full"):
        return Cost(time_s, memory, stored)
    # Both students lie there until the better one is known, each scored, and once more in 4 bits.
    checked = of.speech.count("select", config.select_segments)
    langs = max(1, len(config.langs or of.run.recipe.lang))
    scored = (5 if config.requantized else 2) * langs
    time_s += stored / 200e6 + scored * (
        LOAD_S + of.translating(counts, checked, config.batch_size)
    )
    in_4_bits = counts.decoder * NF4_BYTES + (counts.total - counts.decoder) * 2
    return Cost(time_s, memory, 2 * stored + (in_4_bits if config.requantized else 0))


PACKAGE_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp32": 2.0, "int8": 1.06, "int4": 0.63}
"""Of a weight. A student's are bfloat16, which a float32 package stores as such and widens when it is opened."""


def _computes_on_cpu(package: Any) -> bool:
    """Whether a package is run on the processor, on a machine with a GPU, too: graphs in 16 bits alone are not."""
    target, precision = str(package.target), str(package.precision)
    return target == "gguf" or (target == "onnx" and precision != "fp16")


def _package(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    counts = of.student
    assert counts is not None
    if config.precision == "nf4":
        stored = counts.decoder * NF4_BYTES + (counts.total - counts.decoder) * 2
    else:
        twice = counts.embeddings if config.target == "onnx" and not counts.head else 0
        stored = (counts.total + twice) * PACKAGE_BYTES.get(config.precision, 2.0)
    checked = of.speech.count("select", config.parity_segments)
    on_cpu = _computes_on_cpu(config)
    parity = max(1, len(config.langs)) * (
        of.translating(counts, checked, config.batch_size)
        + of.translating(counts, checked, config.batch_size, on_cpu=on_cpu)
    )
    writing = 25.0 if config.target == "onnx" else LOAD_S
    # Package and student are compared one after the other; a graph is written beside what it is written from.
    held = of.roomy_bytes(counts) if config.target == "checkpoint" else counts.total * 8
    return Cost(writing + stored / 100e6 + parity, 1e9 + held, stored)


def _bench(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    teacher, student = of.teacher, of.student
    assert teacher is not None and student is not None
    scorers = [getattr(config, name, None) for name in ("comet_checkpoint", "embedding_model")]
    models = len(step.inputs) - 2 - sum(map(bool, scorers))
    memory = 1e9 + of.roomy_bytes(teacher)
    if hasattr(config, "repeats"):
        runs = config.repeats + config.warmup
        clip_s = config.short_s + config.long_s
        one = of.translating(teacher, runs * round(clip_s / of.speech.mean_s + 1), 1)
        return Cost((models + 2) * (LOAD_S + one), memory, 1e5)
    segments = of.speech.count(config.split, config.limit)
    rows = segments * getattr(config, "beams", 1)  # every beam is one
    noisy = 0 if config.noise_db is None else 1
    teacher_runs = (3 if config.controls else 1) + noisy
    time_s = teacher_runs * of.translating(teacher, rows, config.batch_size)
    slow = sum(map(_computes_on_cpu, of.run.recipe.packages))
    for count, on_cpu in ((models - slow, False), (slow, True)):
        one = LOAD_S + of.translating(student, rows, config.batch_size, on_cpu=on_cpu)
        time_s += (1 + noisy) * max(0, count) * one
    return Cost(time_s + 10, memory, 1000 * segments * (models + 3))


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


_COSTS: dict[str, Callable[[Estimator, "Step"], Cost]] = {
    "teach": _teach,
    "importance": _importance,
    "prune": _prune,
    "distill": _distill,
    "tune": _tune,
    "merge": _merge,
    "package": _package,
    "bench": _bench,
}
