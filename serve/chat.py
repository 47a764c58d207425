"""POST /v1/chat/completions: a recording in a message, its translation as the reply."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from halve.languages import LANGUAGES
from serve import formats
from serve.answers import JobStream, run_limited, start_stream, while_connected
from serve.audio_input import Recording
from serve.errors import bad_field
from serve.formats import Transcript
from serve.jobs import Job
from serve.pieces import Ticket
from serve.schemas import AudioPart, ChatRequest, ErrorBody, Message, TextPart, body_schema
from serve.service import Service
from serve.translations import check_temperature, faults
from serve.upload import read_body, store_base64

router = APIRouter()

MOST_BODY_BYTES = 48 * 1024 * 1024
"""Chat bodies are held in memory, unlike forms; longer audio belongs there."""
_REQUEST_BODY = {
    "required": True,
    "content": {"application/json": {"schema": body_schema(ChatRequest)}},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A chat completion, or its chunks as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    "4XX": {"model": ErrorBody, "description": "Refused."},
    "5XX": {"model": ErrorBody, "description": "Not possible now, or failed."},
}


def read_message(messages: list[Message]) -> tuple[str, str]:
    """(base64 audio, text) of the conversation: its one recording, and the text beside it.

    Raises:
        ApiError: no recording, or several.
    """
    audio, text = [], ""
    for message in messages:
        parts = message.content if isinstance(message.content, list) else []
        found = [part.input_audio.data for part in parts if isinstance(part, AudioPart)]
        audio += found
        if found:
            text = " ".join(part.text for part in parts if isinstance(part, TextPart))
    if not text and messages:
        # Some tools put the instruction into a message of its own.
        text = " ".join(m.content for m in messages if isinstance(m.content, str))
    if len(audio) != 1:
        raise bad_field(
            "messages",
            f"The messages hold {len(audio)} input_audio parts; send exactly one recording a request.",
        )
    return audio[0], text


def named_language(text: str) -> str | None:
    """The language that an instruction such as "Translate into German" asks for.

    The last one named after "into" or "to" wins, else the last one named at all.
    """
    names = {language.name.lower(): language.code for language in LANGUAGES.values()}
    pattern = "|".join(names)
    lowered = text.lower()
    found = re.findall(rf"\b(?:into|to)\s+({pattern})\b", lowered)
    found = found or re.findall(rf"\b({pattern})\b", lowered)
    return names[found[-1]] if found else None


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses=_ANSWERS,
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def complete(request: Request) -> Response:
    """Translates the recording in the messages; in OpenAI's form."""
    service: Service = request.app.state.service
    ticket = Ticket(request.state.arrival_s)
    async with AsyncExitStack() as held:
        async with service.time_limit(ticket.arrival_s):
            job, wants_stream, with_usage = await _accept(request, service, held, ticket)
        reply = _Reply(job.model.id)
        if wants_stream:
            return await start_stream(request, service, job, reply.events(with_usage), held)
        transcript = await while_connected(request, run_limited(service, job))
    headers = formats.headers(transcript, time.monotonic() - ticket.arrival_s)
    return JSONResponse(reply.whole(transcript), headers=headers)


async def _accept(
    request: Request, service: Service, held: AsyncExitStack, ticket: Ticket
) -> tuple[Job, bool, bool]:
    """The job that the body asks for, whether to stream it, and whether to count its tokens.

    Nothing of the body, which may be large, is kept.
    """
    most = min(service.settings.max_upload_bytes * 4 // 3, MOST_BODY_BYTES)
    async with read_body(request.stream(), most, service.body_room) as body:
        try:
            # Megabytes of JSON take a while: not in the event loop.
            chat = await asyncio.to_thread(ChatRequest.model_validate_json, body)
        except ValidationError as error:
            raise faults(error) from None
        check_temperature(chat.temperature)
        job = await _prepare(request, service, held, chat, ticket)
    options = chat.stream_options
    return job, chat.stream, options is not None and options.include_usage


async def _prepare(
    request: Request, service: Service, held: AsyncExitStack, chat: ChatRequest, ticket: Ticket
) -> Job:
    data, text = read_message(chat.messages)
    lending = held.enter_async_context(service.borrow(chat.model))
    model, engine = await while_connected(request, lending)
    lang = model.choose_language(chat.to_language or named_language(text))
    file = await asyncio.to_thread(store_base64, data, service.directory)
    held.callback(file.close)
    return Job(
        model,
        engine,
        Recording(file, service.settings.max_audio_s),
        lang,
        service.window_s(model),
        ticket,
        service.readers,
        token_limit=chat.max_completion_tokens or chat.max_tokens,
    )


class _Reply:
    """A completion's identity, and its two shapes."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, transcript: Transcript) -> dict[str, Any]:
        """A chat.completion."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": transcript.text, "refusal": None},
            "logprobs": None,
            "finish_reason": _finish_reason(transcript),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(transcript),
        }

    def events(self, with_usage: bool) -> Any:
        """Its chunks, as a function of the running job."""

        async def events(stream: JobStream) -> AsyncIterator[bytes]:
            yield self._chunk({"role": "assistant", "content": ""}, None)
            async for text in stream.texts():
                yield self._chunk({"content": text}, None)
            transcript = stream.transcript()
            yield self._chunk({}, _finish_reason(transcript))
            if with_usage:
                chunk = {**self._head, "object": "chat.completion.chunk", "choices": []}
                yield formats.event({**chunk, "usage": _usage(transcript)})
            yield b"data: [DONE]\n\n"

        return events

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return formats.event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


def _finish_reason(transcript: Transcript) -> str:
    return "length" if transcript.is_truncated else "stop"


def _usage(transcript: Transcript) -> dict[str, int]:
    """Generated tokens; the prompt's are not counted."""
    tokens = transcript.token_count
    return {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens}
