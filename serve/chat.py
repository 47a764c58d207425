"""POST /v1/chat/completions: a recording in a message, its translation as the reply."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from serve import formats
from serve.answers import JobStream, run_limited, start_stream, while_connected
from serve.asked import asked_language
from serve.audio_input import Recording
from serve.errors import ApiError, bad_field
from serve.formats import Transcript
from serve.jobs import Job
from serve.pieces import Ticket
from serve.schemas import AudioPart, ChatRequest, ErrorBody, Message, Part, TextPart, body_schema
from serve.service import Service
from serve.translations import check_temperature, faults, name_ignored, plain_names
from serve.upload import read_body, store_base64

router = APIRouter()

MOST_BODY_BYTES = 48 * 1024 * 1024
"""Chat bodies are held in memory, unlike forms; longer audio belongs there."""
MOST_MARKS = 100_000
"""Commas and opening brackets in a body, which bound its values: each takes a hundred bytes and more."""
_REQUEST_BODY = {
    "required": True,
    "content": {"application/json": {"schema": body_schema(ChatRequest)}},
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A chat completion, or its chunks as server-sent events.",
        "content": {"text/event-stream": {}},
    },
    "4XX": {"model": ErrorBody, "description": "Refused."},
    "5XX": {"model": ErrorBody, "description": "Not possible now, or failed."},
}


def read_chat(body: bytes) -> ChatRequest:
    """The body's fields, checked; megabytes of JSON take a while: not in the event loop.

    Raises:
        ApiError: they cannot be used.
    """
    # A recording is one value, however long; millions of small ones would take gigabytes.
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MOST_MARKS:
        raise ApiError(400, f"The body holds more than {MOST_MARKS:,} values.", code="too_long")
    try:
        chat = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise faults(error) from None
    if chat.model_extra:  # only the names of unknown fields are told
        chat.model_extra.update(dict.fromkeys(chat.model_extra))
    return chat


def read_message(messages: list[Message]) -> tuple[str, list[str]]:
    """(base64 audio, texts) of the conversation: its last recording, and what is said to do with it.

    Chat programs send the whole history again: recordings of earlier messages were translated then. The first
    text is that of the recording's own message; then come those of the system, developer and user messages,
    latest first.

    Raises:
        ApiError: no recording, or several in the last message that has one.
    """
    held = [
        (message, part.input_audio.data)
        for message in messages
        for part in _parts(message)
        if isinstance(part, AudioPart)
    ]
    if not held:
        raise bad_field("messages", "The messages hold no input_audio part; send one recording.")
    own, data = held[-1]
    if (parts := sum(message is own for message, _ in held)) > 1:
        raise bad_field(
            "messages",
            f"The last message with audio holds {parts} input_audio parts; send exactly one recording a message.",
        )
    others = [m for m in reversed(messages) if m is not own and m.role != "assistant"]
    return data, [_text(message) for message in (own, *others)]


def _parts(message: Message) -> list[Part]:
    return message.content if isinstance(message.content, list) else []


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return " ".join(part.text for part in _parts(message) if isinstance(part, TextPart))


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
            events = reply.events(with_usage)
            return name_ignored(await start_stream(request, service, job, events, held), job)
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
        chat = await asyncio.to_thread(read_chat, body)
        check_temperature(chat.temperature)
        job = await _prepare(request, service, held, chat, ticket)
    options = chat.stream_options
    return job, bool(chat.stream), options is not None and bool(options.include_usage)


async def _prepare(
    request: Request, service: Service, held: AsyncExitStack, chat: ChatRequest, ticket: Ticket
) -> Job:
    data, texts = read_message(chat.messages)
    lending = held.enter_async_context(service.borrow(chat.model))
    model, engine = await while_connected(request, lending)
    asked = chat.to_language or asked_language(texts, model.languages or ())
    lang = model.choose_language(asked)
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
        ignored=plain_names(chat.model_extra or ()),
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
            yield self._chunk({}, _finish_reason(transcript), formats.heard(transcript))
            if with_usage:
                chunk = {**self._head, "object": "chat.completion.chunk", "choices": []}
                yield formats.event({**chunk, "usage": _usage(transcript)})
            yield b"data: [DONE]\n\n"

        return events

    def _chunk(
        self,
        delta: dict[str, Any],
        finish_reason: str | None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        head = {**self._head, "object": "chat.completion.chunk"}
        return formats.event({**head, "choices": [choice], **(more or {})})


def _finish_reason(transcript: Transcript) -> str:
    return "length" if transcript.is_truncated else "stop"


def _usage(transcript: Transcript) -> dict[str, int]:
    """Generated tokens; the prompt's are not counted."""
    tokens = transcript.token_count
    return {"prompt_tokens": 0, "completion_tokens": tokens, "total_tokens": tokens}
