"""What each stage will cost here: estimates, from the model's config, the corpus and this machine's speed.

Multiplications are counted (two per parameter and position, six in training); a short matrix product tells
how many this machine does a second; the efficiencies below are rough. In one run of demo/recipe.yaml on two cores the
estimates were 1.4 (importance) to 2.5 (tune) times what the long stages took. Parameter counts are exact.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.importance import DEFAULT_BUDGET
from halve import environment
from halve.corpus import read_corpus
from halve.errors import ArtefactError, HalveError
from halve.families import Counts, Family, family_for
from halve.importers.base import CorpusConfig, Row, Sound
from halve.models import find_config
from pipeline.console import duration, size

if TYPE_CHECKING:
    from pipeline.stages import Run
    from pipeline.steps import Step

POSITIONS_PER_SECOND = 25
"""Decoder positions that a second of audio takes."""
LETTERS_PER_SECOND = 15
"""How a text without audio is counted: as long as it takes to say."""
ASSUMED_AUDIO_WIDTH = 1280
PROMPT_POSITIONS = 40
TOKENS_PER_SECOND = 4
"""Tokens of a translation a second of speech."""
ASSUMED_SEGMENTS = 1000
ASSUMED_SEGMENT_S = 6.0
"""Of a corpus that is not here yet."""
PREFILL_EFFICIENCY = 0.35
DECODE_EFFICIENCY = 0.12
TRAIN_EFFICIENCY = 0.25
STEP_OVERHEAD_S = 0.0006
"""What a decoder layer costs in a step besides arithmetic."""
GPU_FLOPS = 60e12
"""A data-centre GPU, where there is one; not measured here. Stock generation at the 7B shape fits it (H200: 76 s, 61 estimated)."""
GPU_BYTES = 80e9
"""Its memory, likewise assumed."""
GPU_TRAINING = 5
"""How many times as fast a GPU computes where no step waits for the one before: QLoRA of 8 rows at the 7B shape (H200)."""
AGAIN = 0.6
"""What a candidate of the exact search computes, in translations of all segments: the layers after the removed one."""
GPU_AGAIN = 0.05
"""The same on a GPU, where hundreds of rows take a step together (H200: 0.7 s a candidate of 100 segments at the 7B shape)."""
ACTIVATION_NUMBERS = 27
"""Numbers that a decoder layer keeps of a position for its gradients, in widths (19.6 GB measured at the 7B shape, 8 rows)."""
LOAD_S = 6.0
"""Starting torch and loading a small model."""
NF4_BYTES = 0.516
"""Bytes of a weight in NF4 with double quantisation: 4 bits, and 8 bits and 32 bits of scales in 64 and 16,384."""


@dataclass(frozen=True)
class Cost:
    """An estimate; None where the model is not on this machine to be counted."""

    time_s: float | None = None
    memory_bytes: float | None = None
    disk_bytes: float | None = None

    def __str__(self) -> str:
        if self.time_s is None:
            return "an unknown time"
        memory, disk = size(self.memory_bytes or 0), size(self.disk_bytes or 0)
        return f"{duration(max(self.time_s, 1))}, {memory} memory, {disk} disk"


@dataclass(frozen=True)
class Speech:
    """What a corpus holds: segments by split, their mean length, stored bytes."""

    segments: dict[str, int]
    mean_s: float
    stored_bytes: int
    assumed: bool = False
    why: str = ""
    """Of what is assumed: why it is not known."""
    untranslated: int = 0
    """Segments of `train` without any reference."""

    def count(self, split: str, limit: int | None = None, untranslated: bool = False) -> int:
        """Segments of a split that a stage uses; those without a reference among them where it says so."""
        found = self.segments.get(split, 0)
        if split == "train" and not untranslated:
            found -= self.untranslated
        return found if limit is None else min(limit, found)


class Estimator:
    """Estimates the steps of one run."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.unknown = ""

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The teacher's (or base's) config, where it can be had without the weights; else `unknown` says why not."""
        try:
            return find_config(str(self.run.recipe.teacher or self.run.recipe.base))
        except ArtefactError as error:
            self.unknown = error.found
            return None

    @cached_property
    def teacher(self) -> Counts | None:
        """The teacher's parameters."""
        return (
            None if self.config is None else family_for(self.config).count_parameters(self.config)
        )

    @cached_property
    def removed(self) -> int:
        """Layers that go."""
        recipe = self.run.recipe
        if recipe.prune is None:
            return 0
        if recipe.prune.layers is not None:
            return len(recipe.prune.layers)
        return recipe.importance.remove if recipe.importance else 0

    @cached_property
    def student(self) -> Counts | None:
        """The student's parameters."""
        if self.config is None:
            return None
        family: Family = family_for(self.config)
        return family.count_parameters(family.kept_config(self.config, self._kept(family)))

    def _kept(self, family: Family) -> list[int]:
        """The layers that stay: those of the recipe, or as many as a search will leave."""
        assert self.config is not None
        layers, prune = family.num_layers(self.config), self.run.recipe.prune
        if prune is not None and prune.layers is not None:
            return [layer for layer in range(layers) if layer not in prune.layers]
        return family.some_kept(self.config, max(1, layers - self.removed))

    @cached_property
    def speech(self) -> Speech:
        """The corpus: as imported, else as its source tells, else assumed."""
        try:
            return _imported(self.run.corpus)
        except (HalveError, OSError):
            pass
        section = self.run.recipe.corpus
        try:
            if section.format == "hf" and not Path(section.source).exists():
                raise HalveError("the corpus is not here")
            if not Path(section.source).exists():
                raise HalveError(f"{section.source} does not exist")
            return _in_source(section, section.source)
        except (HalveError, OSError) as error:
            counts = _shared(ASSUMED_SEGMENTS, section)
            stored = round(ASSUMED_SEGMENTS * ASSUMED_SEGMENT_S * 32_000)
            why = getattr(error, "found", "") or str(error)
            return Speech(counts, ASSUMED_SEGMENT_S, stored, assumed=True, why=why)

    @cached_property
    def on_gpu(self) -> bool:
        """Whether there is an NVIDIA GPU, told without torch."""
        return shutil.which("nvidia-smi") is not None

    @cached_property
    def flops(self) -> float:
        """Multiplications and additions this machine does a second, measured."""
        if self.on_gpu:
            return GPU_FLOPS
        matrix = np.ones((768, 768), dtype=np.float32)
        np.matmul(matrix, matrix)
        best = float("inf")
        for _ in range(10):  # the best of them: a busy machine interrupts most
            started = time.perf_counter()
            np.matmul(matrix, matrix)
            best = min(best, time.perf_counter() - started)
        return 2 * 768**3 / best

    def cost(self, step: "Step") -> Cost:
        """The estimate for one step."""
        if step.stage == "corpus":
            count = sum(self.speech.segments.values())
            return Cost(1 + 0.002 * count, 100e6, self.speech.stored_bytes)
        if step.stage == "report":
            return Cost(5, 200e6, 5e6)
        if self.teacher is None or self.student is None:
            return Cost()
        return _COSTS[step.stage](self, step)

    def translating(
        self, counts: Counts, segments: int, batch_size: int, hear: bool = True
    ) -> float:
        """Seconds to translate so many segments of mean length; `hear`: encode their audio as well."""
        positions = self.speech.mean_s * POSITIONS_PER_SECOND + PROMPT_POSITIONS
        tokens = self.speech.mean_s * TOKENS_PER_SECOND
        heard = 2 * counts.audio_tower * self.speech.mean_s * POSITIONS_PER_SECOND * 2 * hear
        prefill = 2 * counts.decoder * positions
        decode = 2 * (counts.decoder + counts.head) * tokens
        arithmetic = (heard + prefill) / PREFILL_EFFICIENCY + decode / DECODE_EFFICIENCY
        batches = -(-segments // max(1, batch_size))
        overhead = batches * 1.5 * tokens * counts.decoder_layers * STEP_OVERHEAD_S
        return segments * arithmetic / self.flops + overhead

    def states_bytes(self, segments: int) -> float:
        """What the tower's states of so many segments take on disk: 16 bits a number."""
        assert self.config is not None
        family = family_for(self.config)
        if family.reads == "text":
            return 0.0
        audio = self.config.get("audio_config") or self.config
        width = audio.get("d_model") or audio.get("hidden_size") or ASSUMED_AUDIO_WIDTH
        # A whole window is 1500 positions of the tower; what is cut to the clip's length is pooled by two.
        positions = 1500 if family.hears_whole_window else self.speech.mean_s * POSITIONS_PER_SECOND
        return 2.0 * width * positions * segments

    def training(self, counts: Counts, rows: int, epochs: float, factor: float) -> float:
        """Seconds of training: `factor` is 6 where all weights learn, 4 where an adapter does."""
        positions = (
            self.speech.mean_s * (POSITIONS_PER_SECOND + TOKENS_PER_SECOND) + PROMPT_POSITIONS
        )
        work = factor * (counts.decoder + counts.head) * positions * rows * epochs
        return work / (self.flops * TRAIN_EFFICIENCY * (GPU_TRAINING if self.on_gpu else 1))

    def activations_bytes(self, counts: Counts, config: Any) -> float:
        """What a batch's decoder layers keep for its gradients, in 16 bits."""
        positions = (
            self.speech.mean_s * (POSITIONS_PER_SECOND + TOKENS_PER_SECOND) + PROMPT_POSITIONS
        )
        numbers = ACTIVATION_NUMBERS * _width(counts) * positions * config.batch_size
        layers = 1 if config.checkpoint_activations else counts.decoder_layers
        return float(numbers * layers * 2)


def _width(counts: Counts) -> float:
    """The decoder's width, of the usual proportions."""
    return float((counts.per_layer / 12) ** 0.5)


def _imported(path: Path) -> Speech:
    segments = read_corpus(path).segments
    counts: dict[str, int] = {}
    for segment in segments:
        counts[segment.split] = counts.get(segment.split, 0) + 1
    files = {s.audio for s in segments if s.audio}
    stored = sum((path / name).stat().st_size for name in files)
    length_s = sum(s.duration_s or len(s.source_text) / LETTERS_PER_SECOND for s in segments)
    plain = sum(s.split == "train" and not s.references for s in segments)
    return Speech(counts, length_s / len(segments), stored, untranslated=plain)


def _in_source(section: CorpusConfig, source: str) -> Speech:
    from halve.importers import read_source

    rows = read_source(section, source).rows
    lengths = [
        len(row.source_text) / LETTERS_PER_SECOND if row.audio is None else row.duration_s or 0.0
        for row in rows
        if row.audio is None or row.duration_s is not None
    ]
    mean_s = sum(lengths) / len(lengths) if lengths else ASSUMED_SEGMENT_S
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.split or ""] = counts.get(row.split or "", 0) + 1
    keep = section.untranslated == "keep"
    empty = [row for row in rows if keep and not any(map(str.strip, row.references.values()))]
    if "" in counts or section.split in ("group", "segment", "paper"):
        counts = _shared(len(rows) - len(empty), section)
        counts["train"] += len(empty)
    else:
        empty = [row for row in empty if row.split == "train"]
    return Speech(
        counts,
        mean_s,
        _stored(rows),
        why="" if lengths else "no durations in the source",
        untranslated=len(empty),
    )


def _stored(rows: list[Row]) -> int:
    files = {row.audio for row in rows if isinstance(row.audio, Path)}
    inline = sum(row.audio.size_bytes for row in rows if isinstance(row.audio, Sound))
    return inline + sum(path.stat().st_size for path in files if path.is_file())


def _shared(count: int, section: CorpusConfig) -> dict[str, int]:
    test, select = round(count * section.test_share), round(count * section.select_share)
    return {"test": test, "select": select, "train": count - test - select}


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
    each = 7 * 2 * _width(counts) * counts.decoder_layers * _bytes(config.dtype)
    most = DEFAULT_BUDGET * (GPU_BYTES if of.on_gpu else environment.memory_bytes())
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
    return Cost(LOAD_S + time_s, 0.7e9 + counts.total * _bytes(config.dtype), disk)


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
    time_s, memory = LOAD_S + 2 * stored / 200e6, 1.5e9 + 2 * stored
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
    parity = 2 * of.translating(counts, checked, config.batch_size) * max(1, len(config.langs))
    writing = 25.0 if config.target == "onnx" else LOAD_S
    return Cost(writing + stored / 100e6 + parity, 1e9 + counts.total * 8, stored)


def _bench(of: Estimator, step: "Step") -> Cost:
    config: Any = step.config
    teacher, student = of.teacher, of.student
    assert teacher is not None and student is not None
    scorers = [getattr(config, name, None) for name in ("comet_checkpoint", "embedding_model")]
    models = len(step.inputs) - 2 - sum(map(bool, scorers))
    memory = 1e9 + teacher.total * 4
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
    time_s += (1 + noisy) * models * (LOAD_S + of.translating(student, rows, config.batch_size))
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
