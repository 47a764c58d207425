"""Hooks of `benchmarks/fuzz.sh`: of two valid uploads one holds real speech and only settings that are served.

What schemathesis makes up is no audio, so that it would see refusals alone; these requests come to a translation,
and their answers, streams among them, are checked like the others.
"""

import base64
import itertools
import os
from pathlib import Path
from typing import Any

import schemathesis

from benchmarks.soak_audio import CONTAINERS, encoded
from halve.corpus import read_corpus

_CORPUS = read_corpus(Path(os.environ.get("FUZZ_CORPUS", "demo/corpus")))
_SEGMENT = min(_CORPUS.split("test", "de"), key=lambda segment: segment.duration_s or 0)
_FILES = [encoded(_CORPUS.audio(_SEGMENT), container) for container in CONTAINERS.values()]
_turns = itertools.count()
_SERVED = {"model", "to_language", "response_format", "prompt", "language", "user"}
"""Fields of a form that are kept as they were made up; chats keep `model` and `stream`."""


def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Puts speech into every second valid body that takes any."""
    body = case.body
    parts = [case.meta.generation, *case.meta.components.values()]
    # Cases of the coverage phase are each about one value, which must stay.
    made_for_one = case.meta.phase.name.value == "coverage"
    if not isinstance(body, dict) or made_for_one or any(part.mode.is_negative for part in parts):
        return
    turn = next(_turns)
    if turn % 2:
        return
    file = _FILES[turn // 2 % len(_FILES)]
    if "messages" in body:
        part = {"data": base64.b64encode(file).decode(), "format": "wav"}
        message = {"role": "user", "content": [{"type": "input_audio", "input_audio": part}]}
        kept = {key: body[key] for key in ("model", "stream") if key in body}
        case.body = {**kept, "messages": [message], "to_language": "de"}
    elif "file" in body:
        kept = {key: value for key, value in body.items() if key in _SERVED}
        case.body = {**kept, "file": file, "to_language": "de"}


schemathesis.hook(before_call)
