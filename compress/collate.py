"""Training rows into batches: prompt, audio, target; loss on the target and its end only.

The texts of one segment (languages, transcript, the teacher's version) all follow the same prompt head
and audio. They are laid out as branches behind one copy of it:

    head  audio…  tail₁ target₁  tail₂ target₂ …

A branch sees the shared part and itself, and counts its positions on from the shared part, so that each
has the loss it would have in a row of its own while the audio passes the decoder once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1
SHARED = 0


@dataclass(frozen=True)
class Branch:
    """One text that follows a segment's audio."""

    tail: tuple[int, ...]
    """Prompt tokens after the audio."""
    target: tuple[int, ...]
    """Tokens of the text, its end token last."""
    row: int = -1
    """Its line in rows.jsonl, from 0; -1 where it comes from elsewhere."""


@dataclass(frozen=True)
class TrainingSequence:
    """One segment's audio and everything to be learnt from it."""

    segment: int
    """Place of the segment in the list of those trained on."""
    head: tuple[int, ...]
    """Prompt tokens before the audio."""
    branches: tuple[Branch, ...]

    @property
    def text_length(self) -> int:
        """Positions that are not audio. A target's last token is predicted, never fed."""
        tails = sum(len(branch.tail) + len(branch.target) - 1 for branch in self.branches)
        return len(self.head) + tails


@dataclass(frozen=True)
class Batch:
    """A batch of sequences, padded on the right."""

    ids: Tensor
    """Token ids, 0 where audio or padding stands: (sequences, positions)."""
    is_audio: Tensor
    """Where the audio's states go, row by row: (sequences, positions), bool."""
    positions: Tensor
    """Position ids: (sequences, positions)."""
    mask: Tensor | None
    """Who sees whom, (sequences, 1, positions, positions), bool; None where plain causality says it all."""
    places: Tensor
    """Flat positions whose next token is learnt: (targets,)."""
    labels: Tensor
    """The tokens to be predicted there: (targets,)."""

    def to(self, device: str | torch.device) -> "Batch":
        """The batch on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(
            self.ids.to(device),
            self.is_audio.to(device),
            self.positions.to(device),
            mask,
            self.places.to(device),
            self.labels.to(device),
        )


def collate(sequences: Sequence[TrainingSequence], audio_positions: Sequence[int]) -> Batch:
    """Lays sequences out side by side.

    Args:
        audio_positions: how many positions the audio of each sequence takes.
    """
    lengths = [
        sequence.text_length + audio
        for sequence, audio in zip(sequences, audio_positions, strict=True)
    ]
    shape = (len(sequences), max(lengths))
    ids = torch.zeros(shape, dtype=torch.long)
    is_audio = torch.zeros(shape, dtype=torch.bool)
    positions = torch.zeros(shape, dtype=torch.long)
    branch_of = torch.full(shape, PADDING, dtype=torch.int16)
    places: list[int] = []
    labels: list[int] = []
    for row, (sequence, audio) in enumerate(zip(sequences, audio_positions, strict=True)):
        start = len(sequence.head)
        shared = start + audio
        ids[row, :start] = torch.tensor(sequence.head, dtype=torch.long)
        is_audio[row, start:shared] = True
        positions[row, :shared] = torch.arange(shared)
        branch_of[row, :shared] = SHARED
        place = shared
        for number, branch in enumerate(sequence.branches, start=1):
            fed = [*branch.tail, *branch.target[:-1]]
            end = place + len(fed)
            ids[row, place:end] = torch.tensor(fed, dtype=torch.long)
            positions[row, place:end] = torch.arange(shared, shared + len(fed))
            branch_of[row, place:end] = number
            first = row * shape[1] + place + len(branch.tail) - 1
            places += range(first, first + len(branch.target))
            labels += branch.target
            place = end
    single = all(len(sequence.branches) == 1 for sequence in sequences)
    return Batch(
        ids,
        is_audio,
        positions,
        None if single else branch_mask(branch_of),
        torch.tensor(places),
        torch.tensor(labels),
    )


def branch_mask(branch_of: Tensor) -> Tensor:
    """Who sees whom: the shared part and one's own branch, never what comes later.

    Args:
        branch_of: the branch of each position, SHARED or PADDING; (sequences, positions).

    Returns:
        (sequences, 1, positions, positions), bool; padding sees itself, so that no row is empty.
    """
    place = torch.arange(branch_of.shape[1], device=branch_of.device)
    earlier = place[None, :] <= place[:, None]
    asking, asked = branch_of[:, :, None], branch_of[:, None, :]
    return (earlier & ((asked == SHARED) | (asked == asking)))[:, None]


def span_mask(lengths: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Which audio positions to blank, in spans of SPAN_POSITIONS that may overlap.

    Returns:
        (sum of lengths,), bool; about `share` of each clip at most.
    """
    masks = []
    for length in lengths:
        mask = torch.zeros(length, dtype=torch.bool)
        for _ in range(int(share * length / SPAN_POSITIONS + _uniform(generator))):
            start = int(_uniform(generator) * max(1, length - SPAN_POSITIONS))
            mask[start : start + SPAN_POSITIONS] = True
        masks.append(mask)
    return torch.cat(masks)


SPAN_POSITIONS = 8
"""Length of a blanked span: 0.3 s, about one word, at 25 positions a second."""


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


BUCKET_BATCHES = 32
"""Batches whose rows are sorted by length together: little padding, and still a good shuffle."""


def plan_epoch(
    lengths: Sequence[int], rows: Sequence[int], batch_rows: int, generator: torch.Generator
) -> list[list[int]]:
    """Batches of sequence numbers for one epoch, in the order they are trained on.

    Args:
        lengths: positions of each sequence.
        rows: training rows in each sequence.
        batch_rows: rows in a batch; one sequence with more is a batch of its own.
        generator: decides the order, alone.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    bucket: list[int] = []
    held = 0
    for number in order:
        bucket.append(number)
        held += rows[number]
        if held >= BUCKET_BATCHES * batch_rows:
            batches += _fill(bucket, lengths, rows, batch_rows)
            bucket, held = [], 0
    batches += _fill(bucket, lengths, rows, batch_rows)
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[place] for place in shuffled]


def _fill(
    bucket: list[int], lengths: Sequence[int], rows: Sequence[int], batch_rows: int
) -> list[list[int]]:
    batches: list[list[int]] = []
    batch: list[int] = []
    held = 0
    for number in sorted(bucket, key=lambda number: (-lengths[number], number)):
        if batch and held + rows[number] > batch_rows:
            batches.append(batch)
            batch, held = [], 0
        batch.append(number)
        held += rows[number]
    if batch:
        batches.append(batch)
    return batches
