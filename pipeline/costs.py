"""What work costs here: multiplications counted from a model's config, the corpus and this machine's speed.

Two multiplications per parameter and position, six in training; a short matrix product tells how many this machine
does a second; the efficiencies below are rough. Parameter counts are exact. `pipeline.stage_costs` says what each stage takes.
"""

import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from halve import environment
from halve.errors import ArtefactError
from halve.families import Counts, Family, family_for
from halve.models import find_config
from pipeline.console import duration, size
from pipeline.speech import Speech, find_speech

if TYPE_CHECKING:
    from pipeline.stages import Run

POSITIONS_PER_SECOND = 25
"""Decoder positions that a second of audio takes."""
ASSUMED_AUDIO_WIDTH = 1280
PROMPT_POSITIONS = 40
TOKENS_PER_SECOND = 4
"""Tokens of a translation a second of speech."""
PREFILL_EFFICIENCY = 0.35
DECODE_EFFICIENCY = 0.12
TRAIN_EFFICIENCY = 0.25
STEP_OVERHEAD_S = 0.0006
"""What a decoder layer costs in a step besides arithmetic."""
GPU_FLOPS = 60e12
"""A data-centre GPU, where there is one; not measured here. Stock generation at the 7B shape fits it (H200: 76 s, 61 estimated)."""
GPU_BYTES = 80e9
"""Its memory, where nvidia-smi does not say."""
GPU_TRAINING = 5
"""How many times as fast a GPU computes where no step waits for the one before: QLoRA of 8 rows at the 7B shape (H200)."""
ACTIVATION_NUMBERS = 27
"""Numbers that a decoder layer keeps of a position for its gradients, in widths (19.6 GB measured at the 7B shape, 8 rows)."""


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
        section = self.run.recipe.corpus
        return find_speech(self.run.corpus, section, section.source)

    @cached_property
    def on_gpu(self) -> bool:
        """Whether there is an NVIDIA GPU, told without torch."""
        return shutil.which("nvidia-smi") is not None

    @cached_property
    def device_bytes(self) -> float:
        """The memory of the GPU, told without torch; of this machine where there is none."""
        if not self.on_gpu:
            return float(environment.memory_bytes())
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
            return float(told.stdout.split()[0]) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return GPU_BYTES

    def roomy_bytes(self, counts: Counts) -> float:
        """Of weights as `merge`, `package` and the benches hold them: in float32 where a GPU has room for that."""
        is_tight = self.on_gpu and 4 * counts.total > environment.WEIGHTS_SHARE * self.device_bytes
        return counts.total * (2.0 if is_tight else 4.0)

    @cached_property
    def flops(self) -> float:
        """Multiplications and additions this machine does a second: a GPU's assumed, else measured."""
        return GPU_FLOPS if self.on_gpu else self.cpu_flops

    @cached_property
    def cpu_flops(self) -> float:
        """What the processor does, measured."""
        matrix = np.ones((768, 768), dtype=np.float32)
        np.matmul(matrix, matrix)
        best = float("inf")
        for _ in range(10):  # the best of them: a busy machine interrupts most
            started = time.perf_counter()
            np.matmul(matrix, matrix)
            best = min(best, time.perf_counter() - started)
        return 2 * 768**3 / best

    def translating(
        self,
        counts: Counts,
        segments: int,
        batch_size: int,
        hear: bool = True,
        on_cpu: bool = False,
    ) -> float:
        """Seconds to translate so many segments of mean length; `hear`: encode their audio as well; `on_cpu`: even
        where there is a GPU, as ONNX packages do."""
        positions = self.speech.mean_s * POSITIONS_PER_SECOND + PROMPT_POSITIONS
        tokens = self.speech.mean_s * TOKENS_PER_SECOND
        heard = 2 * counts.audio_tower * self.speech.mean_s * POSITIONS_PER_SECOND * 2 * hear
        prefill = 2 * counts.decoder * positions
        decode = 2 * (counts.decoder + counts.head) * tokens
        arithmetic = (heard + prefill) / PREFILL_EFFICIENCY + decode / DECODE_EFFICIENCY
        batches = -(-segments // max(1, batch_size))
        overhead = batches * 1.5 * tokens * counts.decoder_layers * STEP_OVERHEAD_S
        return segments * arithmetic / (self.cpu_flops if on_cpu else self.flops) + overhead

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
        rows = min(config.batch_size, config.rows_at_once or config.batch_size)
        numbers = ACTIVATION_NUMBERS * width(counts) * positions * rows
        layers = 1 if config.checkpoint_activations else counts.decoder_layers
        return float(numbers * layers * 2)


def width(counts: Counts) -> float:
    """The decoder's width, of the usual proportions."""
    return float((counts.per_layer / 12) ** 0.5)
