"""Sentences packed for the decoder's warm-up: tasks of one sentence share its English.

A row is a trunk (the prompt with the English text in the audio slot) with one branch a task, each of
which sees the trunk and itself. Its loss is that of the same tasks as plain sequences.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo.build_teacher import AUDIO_BOS, IM_END, render_prompt

PADDING = -1  # branch number of a padded position
TRUNK = 0


@dataclass(frozen=True)
class Row:
    """One sentence with its tasks, packed behind the constant prefix; all lists have one length.

    `branches` holds 0 for the trunk and 1, 2, … for the tasks; `labels` holds the token that the
    position must predict, or -100.
    """

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    labels: list[int]


def common_length(sequences: list[list[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    for index, column in enumerate(zip(*sequences, strict=False)):
        if len(set(column)) > 1:
            return index
    return min(len(sequence) for sequence in sequences)


class Packer:
    """Turns sentences into rows with the tokenizer's prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        before_slot = render_prompt("de").split(AUDIO_BOS)[0] + AUDIO_BOS
        self.prefix: list[int] = tokenizer.encode(before_slot, add_special_tokens=False)
        self.end: int = tokenizer.convert_tokens_to_ids(IM_END)

    def prompt(self, sentence: dict[str, str], lang: str) -> list[int]:
        """Tokens of the prompt behind the prefix, the English sentence in the audio slot."""
        rendered = render_prompt(lang, audio=sentence["en"])
        tokens: list[int] = self.tokenizer.encode(rendered, add_special_tokens=False)
        return tokens[len(self.prefix) :]

    def pack_row(self, sentence: dict[str, str], langs: list[str]) -> Row:
        """The sentence with one branch for each of `langs`."""
        prompts = [self.prompt(sentence, lang) for lang in langs]
        trunk = common_length(prompts)
        if len(prompts) == 1:
            trunk -= 1  # the last token of the prompt predicts, so it must be in the branch
        row = Row(prompts[0][:trunk], list(range(trunk)), [TRUNK] * trunk, [-100] * trunk)
        for branch, (lang, prompt) in enumerate(zip(langs, prompts, strict=True), start=1):
            target = self.tokenizer.encode(sentence[lang], add_special_tokens=False)
            opening = prompt[trunk:]
            inputs = opening + target
            row.tokens.extend(inputs)
            row.positions.extend(range(trunk, trunk + len(inputs)))
            row.branches.extend([branch] * len(inputs))
            row.labels.extend([-100] * (len(opening) - 1) + target + [self.end])
        return row


def branch_mask(branches: Tensor, prefix_length: int) -> Tensor:
    """Which position sees which: (rows, 1, length, prefix + length), True where it may look.

    A position sees the prefix, and of what stands before it (itself included) the trunk and its own
    branch. Padded positions see the prefix too, so that no softmax is empty.
    """
    rows, length = branches.shape
    query, key = branches[:, :, None], branches[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = causal & ((key == query) | (key == TRUNK)) & (key != PADDING)
    prefix = torch.ones(rows, length, prefix_length, dtype=torch.bool)
    return torch.cat([prefix, seen], dim=2)[:, None]


def batches_of(rows: list[Row], batch_tokens: int, generator: random.Random) -> list[list[Row]]:
    """Rows of like length together, at most `batch_tokens` padded positions each, in random order."""
    order = sorted(rows, key=lambda row: (len(row.tokens), generator.random()))
    batches: list[list[Row]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(row.tokens) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    generator.shuffle(batches)
    return batches
