"""The segments as a decoder takes them in: encoded once a search, and kept in main memory for all of it.

A GPU's memory is for what is worked on: a chunk's segments are moved there when it begins.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.task import SearchTask
from halve.crew import Crew
from halve.families import Source
from halve.models import SpeechModel
from halve.sources import asked


def take_in(speech: SpeechModel, source: Source) -> Any:
    """See `Family.take_in`."""
    taken = speech.family.take_in(speech.model, speech.processor, source)
    return taken.cpu() if isinstance(taken, Tensor) else taken


def embed_prompts(speech: SpeechModel, task: SearchTask, crew: Crew) -> list[Tensor]:
    """Prompt and audio of every segment as decoder inputs (tokens, hidden): the audio tower's only run."""
    family, model, processor = speech.family, speech.model, speech.processor
    with torch.inference_mode(), crew:
        heard = crew.map(partial(take_in, speech), task.audio)
        # What a prompt is made of goes with it: nothing stands in memory twice.
        heard.reverse()
        return [
            family.embed_prompt(
                model, processor, asked(family, task.lang, source), heard.pop()
            ).cpu()
            for source in task.audio
        ]


def held_bytes(encoded: Sequence[Tensor], device: torch.device) -> int:
    """What encoded segments take of the memory that the search plans with: none of a GPU's."""
    return sum(states.nbytes for states in encoded) if device.type == "cpu" else 0


def common_start(prompts: Sequence[Tensor]) -> int:
    """How many inputs all prompts (tokens, hidden) begin with; each keeps at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts)
    same = torch.ones(shortest, dtype=torch.bool)
    for prompt in prompts:
        same &= (prompt[:shortest] == prompts[0][:shortest]).all(-1)
    return min(int(same.long().cumprod(0).sum()), shortest - 1)
