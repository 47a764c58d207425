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


def take_all(speech: SpeechModel, sources: Sequence[Source], crew: Crew | None = None) -> list[Any]:
    """All segments as `take_in` gives them; the shortest and the longest first, which tell what the others take.

    Raises:
        InputError: main memory does not hold them.
    """
    lengths = [len(source) for source in sources]
    order = sorted(range(len(sources)), key=lengths.__getitem__)
    ends = [order[0], order[-1]] if order else []
    found = {place: take_in(speech, sources[place]) for place in dict.fromkeys(ends)}
    if speech.family.reads == "audio" and ends:  # a text is small
        _check_room(lengths, ends, [found[place].nbytes for place in ends])
    rest = [place for place in range(len(sources)) if place not in found]
    encode = partial(take_in, speech)
    todo = [sources[place] for place in rest]
    found |= zip(rest, crew.map(encode, todo) if crew else map(encode, todo), strict=True)
    return [found[place] for place in range(len(sources))]


def _check_room(lengths: Sequence[int], ends: Sequence[int], sizes: Sequence[int]) -> None:
    """Refuses segments of such lengths where they take too much, as the shortest and the longest of them tell.

    Raises:
        InputError: they do.
    """
    (shortest, longest), (least, most) = (lengths[place] for place in ends), sizes
    slope = (most - least) / max(longest - shortest, 1)
    needed = sum(least + slope * (length - shortest) for length in lengths)
    room = SHARE * environment.memory_bytes()
    if needed > room:
        raise InputError(
            f"{len(lengths)} encoded segments take about {needed / 1e9:.1f} GB of main memory",
            expected=f"at most {room / 1e9:.1f} GB on this machine",
            mend="rank on fewer --segments, or with --dtype bfloat16",
        )


def embed_prompts(speech: SpeechModel, task: SearchTask, crew: Crew) -> list[Tensor]:
    """Prompt and audio of every segment as decoder inputs (tokens, hidden): the audio tower's only run."""
    family, model, processor = speech.family, speech.model, speech.processor
    with torch.inference_mode(), crew:
        heard = take_all(speech, task.audio, crew)
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
