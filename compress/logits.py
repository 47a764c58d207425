"""The teacher's distribution over the next token, at every position of every training row.

What logit distillation learns from (Hinton et al. 2015; word-level distillation in Kim and Rush 2016). A
vocabulary's worth of numbers a position would not fit any disk: the `top` most likely tokens are kept with
their log-probabilities, and the rest is one further outcome with what probability is left.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compress.collate import TrainingSequence, collate
from compress.gradients import target_logits
from compress.states import AudioStates
from halve.errors import ArtefactError
from halve.json_files import append_jsonl, read_json, read_jsonl, write_json
from halve.models import SpeechModel
from halve.progress import SILENT, Progress

TOKENS, VALUES, INDEX, META = (
    "logit_tokens.bin",
    "logit_values.bin",
    "logit_index.jsonl",
    "logits.json",
)
BATCH_SEQUENCES = 8
_POSITIONS_AT_ONCE = 256
_LEAST = 1e-7
"""Probability below which the rest counts as this much, so that its logarithm is a number."""


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher thought likely at some positions."""

    tokens: Tensor
    """Token ids, (positions, top), int64."""
    log_probabilities: Tensor
    """Their natural log-probabilities, (positions, top), float32."""

    def to(self, device: str | torch.device) -> "SoftTargets":
        """The targets on another device."""
        return SoftTargets(self.tokens.to(device), self.log_probabilities.to(device))


class StoredLogits:
    """A teacher's distributions, read from disk row by row."""

    def __init__(self, folder: Path) -> None:
        """Opens the store of a translations artefact.

        Raises:
            ArtefactError: it has none.
        """
        if not (folder / META).is_file():
            raise ArtefactError(
                f"{folder} holds no distributions of the teacher",
                expected=f"{META} and the files beside it",
                mend="make it with `halve distill --logits 8`, or tune with --logit-weight 0",
            )
        self.top = int(read_json(folder / META)["top"])
        lines = read_jsonl(folder / INDEX)
        rows = {row: length for line in lines for row, length in line["rows"]}
        starts = [0, *accumulate(rows.values())]
        self._places = dict(zip(rows, zip(starts, rows.values(), strict=False), strict=True))
        shape = (starts[-1], self.top)
        self._tokens = np.memmap(folder / TOKENS, np.int32, "r", shape=shape)
        self._values = np.memmap(folder / VALUES, np.float16, "r", shape=shape)

    def read(self, sequences: Sequence[TrainingSequence]) -> SoftTargets:
        """The distributions of all target positions of sequences, in the order that `collate` lays them out.

        Raises:
            ArtefactError: a row's tokens are not as many as when the teacher read it.
        """
        parts = []
        for branch in (branch for each in sequences for branch in each.branches):
            start, length = self._places.get(branch.row, (0, -1))
            if length != len(branch.target):
                raise ArtefactError(
                    f"Row {branch.row + 1} has {len(branch.target)} tokens here, "
                    f"{max(0, length)} where the teacher read it",
                    expected="a student with the teacher's own tokenizer, and the rows that distill wrote",
                )
            parts.append(slice(start, start + length))
        tokens = np.concatenate([self._tokens[part] for part in parts])
        values = np.concatenate([self._values[part] for part in parts])
        return SoftTargets(
            torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(values.astype(np.float32))
        )


def store_logits(
    speech: SpeechModel,
    sequences: Sequence[TrainingSequence],
    audio: AudioStates,
    folder: Path,
    top: int,
    progress: Progress = SILENT,
) -> None:
    """Writes the `top` most likely tokens at every target position of every row, goes on where it was killed.

    Six bytes a token kept: 8 of them over 16,000 rows of 20 tokens are 15 MB.
    """
    batches = _batches(sequences, audio)
    done = read_jsonl(folder / INDEX)
    positions = sum(length for line in done for _, length in line["rows"])
    with (
        open(folder / TOKENS, "ab") as tokens,
        open(folder / VALUES, "ab") as values,
        progress.task("Teacher's distributions", len(batches), len(done)) as advance,
    ):
        tokens.truncate(4 * top * positions)  # what a kill left of an unfinished batch
        values.truncate(2 * top * positions)
        for batch in batches[len(done) :]:
            chosen = [sequences[number] for number in batch]
            found = _distributions(speech, chosen, audio, top)
            for file, array, dtype in (
                (tokens, found.tokens, np.int32),
                (values, found.log_probabilities, np.float16),
            ):
                file.write(array.cpu().numpy().astype(dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())  # before the line that says they are there
            rows = [[branch.row, len(branch.target)] for each in chosen for branch in each.branches]
            append_jsonl(folder / INDEX, {"rows": rows})
            advance()
    write_json(folder / META, {"top": top})


def _batches(sequences: Sequence[TrainingSequence], audio: AudioStates) -> list[list[int]]:
    """Sequences of like length together."""
    lengths = [each.text_length + audio.lengths[each.segment] for each in sequences]
    order = sorted(range(len(sequences)), key=lambda number: (-lengths[number], number))
    return [
        order[start : start + BATCH_SEQUENCES] for start in range(0, len(order), BATCH_SEQUENCES)
    ]


@torch.inference_mode()
def _distributions(
    speech: SpeechModel, sequences: Sequence[TrainingSequence], audio: AudioStates, top: int
) -> SoftTargets:
    clips = [audio.read(each.segment).to(speech.device) for each in sequences]
    lengths = [0 if speech.family.attends_to_encoder else len(clip) for clip in clips]
    batch = collate(sequences, lengths).to(speech.device)
    logits = target_logits(speech, batch, torch.cat(clips))
    # A part at a time: over a large vocabulary the float32 copies of all positions take gigabytes.
    found = [
        torch.topk(functional.log_softmax(part.float(), dim=-1), top)
        for part in torch.split(logits, _POSITIONS_AT_ONCE)
    ]
    return SoftTargets(
        torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
    )


def divergence(logits: Tensor, targets: SoftTargets, direction: str) -> Tensor:
    """Kullback-Leibler divergence between teacher and student, summed over positions.

    Over the teacher's likeliest tokens and one outcome for all others.

    Args:
        logits: the student's, (positions, vocabulary).
        direction: forward, KL(teacher || student), which covers all that the teacher thinks likely; or
            reverse, KL(student || teacher), which keeps to what it thinks likeliest (Gu et al. 2024,
            MiniLLM, arXiv 2306.08543).
    """
    own = functional.log_softmax(logits.float(), dim=-1).gather(-1, targets.tokens)
    teacher, student = _with_rest(targets.log_probabilities), _with_rest(own)
    if direction == "reverse":
        teacher, student = student, teacher
    return (teacher.exp() * (teacher - student)).sum()


@dataclass(frozen=True)
class LogitLoss:
    """Cross entropy and divergence from the teacher, mixed."""

    store: StoredLogits
    weight: float
    """Share of the divergence, 0 to 1."""
    direction: str

    def __call__(
        self, entropy: Tensor, logits: Tensor, sequences: Sequence[TrainingSequence]
    ) -> Tensor:
        """See `compress.gradients.SoftLoss`; a sum over positions, as the cross entropy is."""
        targets = self.store.read(sequences).to(logits.device)
        return (1 - self.weight) * entropy + self.weight * divergence(
            logits, targets, self.direction
        )


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """One more column: what probability the others have together."""
    rest = (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp_min(_LEAST)
    return torch.cat([log_probabilities, rest.log()], dim=-1)
