"""The audio tower's states of every training segment: computed once, kept on disk, read at random.

A frozen tower gives the same states in every epoch. They are appended to one flat file of float16
(`states.bin`) a chunk at a time, each chunk then noted in `index.jsonl`: a killed run loses at most the
chunk being written, and only a memory map is ever open on what may be many gigabytes. A store is named after
what is in it, so that runs that hear the same audio with the same tower may share one.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from halve import environment
from halve.artefact import identity
from halve.corpus import Corpus, Segment
from halve.crew import Crew
from halve.json_files import append_jsonl, read_json, read_jsonl, write_json
from halve.models import SpeechModel
from halve.progress import SILENT, Progress

CHUNK_SEGMENTS = 64
_LARGEST = float(np.finfo(np.float16).max)


class AudioStates(Protocol):
    """Where training takes the audio's states from."""

    @property
    def lengths(self) -> Sequence[int]:
        """Positions of each segment, or what is proportional to them: for sorting by length."""
        ...

    def read(self, segment: int) -> Tensor:
        """Tower states of one segment: (positions, width)."""
        ...


class LiveStates:
    """States computed anew at each call, with gradients: for a tower that trains."""

    def __init__(self, speech: SpeechModel, corpus: Corpus, segments: Sequence[Segment]) -> None:
        self._speech, self._corpus, self._segments = speech, corpus, segments
        self.lengths = [round(100 * segment.duration_s) for segment in segments]

    def read(self, segment: int) -> Tensor:
        """See AudioStates."""
        speech = self._speech
        audio = self._corpus.audio(self._segments[segment])
        return speech.family.encode(speech.model, speech.processor, audio)


class NoStates:
    """For a model that reads: its texts are in the prompts, and no state stands beside them."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.lengths = [0] * len(segments)

    def read(self, segment: int) -> Tensor:
        """See AudioStates: shape (0, 0)."""
        return torch.empty(0, 0)


def open_states(
    speech: SpeechModel,
    corpus: Corpus,
    segments: Sequence[Segment],
    folder: Path | None,
    progress: Progress = SILENT,
) -> AudioStates:
    """The segments' states as the model's family needs them: stored under `folder`, live if that is None."""
    if speech.family.reads == "text":
        return NoStates(segments)
    if folder is None:
        return LiveStates(speech, corpus, segments)
    return store_states(speech, corpus, segments, folder, progress)


class StoredStates:
    """States read from a finished store."""

    def __init__(self, folder: Path) -> None:
        chunks = read_jsonl(folder / "index.jsonl")
        self.lengths = [length for chunk in chunks for length in chunk["positions"]]
        self._starts = [0, *accumulate(self.lengths)]
        width = read_json(folder / "meta.json")["width"]
        shape = (self._starts[-1], width)
        self._states = np.memmap(folder / "states.bin", np.float16, "r", shape=shape)

    def read(self, segment: int) -> Tensor:
        """See AudioStates; float16."""
        start, end = self._starts[segment : segment + 2]
        return torch.from_numpy(np.array(self._states[start:end]))


def store_states(
    speech: SpeechModel,
    corpus: Corpus,
    segments: Sequence[Segment],
    folder: Path,
    progress: Progress = SILENT,
) -> StoredStates:
    """The segments' states out of a store under `folder`, after computing those that are not there yet.

    The store's name stands for the tower's weights, their type, the corpus and the segments: another process
    that wants the same one waits for it. About 19 kB a second of audio at Whisper tiny's width, 64 kB at
    Qwen2-Audio's.
    """
    store = folder / f"states-{_key(speech, corpus, segments)[:16]}"
    store.mkdir(parents=True, exist_ok=True)
    with _alone(store):
        _complete(speech, corpus, segments, store, progress)
    return StoredStates(store)


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Lets one process at a time write a store; the lock goes with the process."""
    with open(store / "lock", "wb") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _complete(
    speech: SpeechModel,
    corpus: Corpus,
    segments: Sequence[Segment],
    store: Path,
    progress: Progress,
) -> None:
    """Computes what a store lacks."""
    meta = store / "meta.json"
    if not meta.is_file():
        write_json(meta, {"width": int(_encode(speech, corpus, segments[0]).shape[1])})
    width = read_json(meta)["width"]
    chunks = read_jsonl(store / "index.jsonl")
    done = sum(len(chunk["positions"]) for chunk in chunks)
    size_bytes = 2 * width * sum(sum(chunk["positions"]) for chunk in chunks)
    with (
        open(store / "states.bin", "ab") as file,
        progress.task("Encoding audio", len(segments), done) as advance,
        Crew(torch.device(speech.device)) as crew,
    ):
        file.truncate(size_bytes)  # what a kill left of an unfinished chunk
        for start in range(done, len(segments), CHUNK_SEGMENTS):
            chunk = segments[start : start + CHUNK_SEGMENTS]
            positions = []
            for states in crew.map(partial(_encode, speech, corpus), chunk):
                file.write(states.tobytes())
                positions.append(len(states))
                advance()
            file.flush()
            os.fsync(file.fileno())  # before the line that says they are there
            append_jsonl(store / "index.jsonl", {"positions": positions})


def _encode(speech: SpeechModel, corpus: Corpus, segment: Segment) -> np.ndarray:
    with torch.inference_mode():
        states = speech.family.encode(speech.model, speech.processor, corpus.audio(segment))
        return states.float().clamp(-_LARGEST, _LARGEST).half().cpu().numpy()


def _front_end(speech: SpeechModel) -> dict[str, Any]:
    """What turns audio into states beside the tower's weights: settings, family, and code by its versions."""
    extractor = getattr(speech.processor, "feature_extractor", None)
    tower = (
        getattr(speech.part(speech.family.audio_tower), "config", None)
        if speech.family.audio_tower
        else None
    )
    known = environment.versions()
    return {
        "family": speech.family.name,
        "features": extractor.to_dict() if extractor is not None else {},
        "tower": tower.to_dict() if tower is not None else {},
        "versions": {name: known.get(name) for name in ("halve", "transformers")},
    }


def _key(speech: SpeechModel, corpus: Corpus, segments: Sequence[Segment]) -> str:
    """Stands for the tower's weights, their type, the front end, the corpus and the segments in their order."""
    digest = hashlib.sha256(f"{identity(corpus.path)} {speech.dtype}\n".encode())
    digest.update(json.dumps(_front_end(speech), sort_keys=True, default=str).encode())
    # A family without a tower hands frames on as they are.
    tower = speech.part(speech.family.audio_tower).state_dict() if speech.family.audio_tower else {}
    for name, tensor in sorted(tower.items()):
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().tobytes())
    digest.update("\n".join(segment.id for segment in segments).encode())
    return digest.hexdigest()
