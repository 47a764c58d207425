"""The segments as a decoder takes them in: encoded once a search, and kept in main memory for all of it.

A GPU's memory is for what is worked on: a chunk's segments are moved there when it begins.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.task import SearchTask
from halve import environment
from halve.crew import Crew
from halve.errors import InputError
from halve.families import Source
from halve.models import SpeechModel
from halve.sources import asked

SHARE = 0.8
"""Of main memory: the most that encoded segments may take."""


def take_in(speech: SpeechModel, source: Source) -> Any:
    """See `Family.take_in`."""
    taken = speech.family.take_in(speech.model, speech.processor, source)
    return taken.cpu() if isinstance(taken, Tensor) else taken


def check_room(speech: SpeechModel, sources: Sequence[Source]) -> None:
    """Refuses more segments than main memory holds encoded, before all of them are: two tell what the others take.

    Raises:
        InputError: they would take more than a share of it.
    """
    if speech.family.reads != "audio" or not sources:
        return
    lengths = [len(source) for source in sources]
    least, most = min(lengths), max(lengths)
    with torch.inference_mode():
        small, large = (
            take_in(speech, sources[lengths.index(length)]).nbytes for length in (least, most)
        )
    slope = (large - small) / max(most - least, 1)
    needed = sum(small + slope * (length - least) for length in lengths)
    room = SHARE * environment.memory_bytes()
    if needed > room:
        raise InputError(
            f"{len(sources)} encoded segments take about {needed / 1e9:.1f} GB of main memory",
            expected=f"at most {room / 1e9:.1f} GB on this machine",
            mend="rank on fewer --segments, or with --dtype bfloat16",
        )


def embed_prompts(speech: SpeechModel, task: SearchTask, crew: Crew) -> list[Tensor]:
    """Prompt and audio of every segment as decoder inputs (tokens, hidden): the audio tower's only run."""
    family, model, processor = speech.family, speech.model, speech.processor
    check_room(speech, task.audio)
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
