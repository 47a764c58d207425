"""Models and tasks for tests of the importance search."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.footprint import Footprint
from compress.importance import make_task
from compress.task import SearchTask
from halve.corpus import read_corpus
from halve.models import SpeechModel, load_model
from tests import tiny


def opened(
    folder: Path,
    corpus: Path,
    *,
    seed: int = 0,
    most: int = 16,
    segments: int = 4,
    lang: str = "de",
    **decoder: Any,
) -> tuple[SpeechModel, SearchTask]:
    """A random model that behaves as a trained one does in a search, and its task on `select`."""
    speech = load_model(tiny.make_model(folder / f"model-{seed}", seed=seed, **decoder))
    liven(speech)
    heard = read_corpus(corpus)
    metric = "chrf" if lang == "zh" else "chrf++"
    task = make_task(speech, heard, heard.split("select", lang, segments), lang, metric)
    return speech, replace(task, limits=tuple(min(limit, most) for limit in task.limits))


def liven(speech: SpeechModel) -> None:
    """Makes a layer matter little, so that drafts agree for a while, and the end token likely."""
    with torch.no_grad():
        for layer in speech.part(speech.family.layers):
            layer.self_attn.o_proj.weight.mul_(0.25)
            layer.mlp.down_proj.weight.mul_(0.25)
        ends = list(speech.family.end_ids(speech.model))
        speech.part(speech.family.head).weight[ends] *= 2.5


class Scripted:
    """A translator that plays back texts: (layer left out, segment) -> text; counts what it is asked."""

    def __init__(self, script: dict[int | None, list[str]]) -> None:
        self.script = script
        self.asked: list[tuple[int | None, int]] = []

    def footprint(self) -> Footprint:
        """Takes no memory."""
        return Footprint((0,) * len(next(iter(self.script.values()))))

    def run(
        self,
        kept: Sequence[int],
        drafts: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int | None]],
        rows: Sequence[int],
    ) -> Any:
        """Characters of the scripted texts as tokens."""
        for group in candidates:
            self.asked += [(layer, row) for layer in group for row in rows]
            yield {
                layer: [[ord(letter) for letter in self.script[layer][row]] for row in rows]
                for layer in group
            }

    def groups(self, candidates: Sequence[int | None]) -> list[list[int | None]]:
        """Two by two."""
        return [list(candidates[start : start + 2]) for start in range(0, len(candidates), 2)]


def scripted_task(references: Sequence[str]) -> SearchTask:
    """A task for `Scripted`."""
    return SearchTask(
        lang="de",
        metric="chrf++",
        ids=tuple(f"s{index}" for index in range(len(references))),
        audio=(),
        references=tuple(references),
        limits=(1000,) * len(references),
        decode=lambda tokens: "".join(map(chr, tokens)),
    )
