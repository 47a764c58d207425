"""POST /v1/audio/translations."""

import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError

from serve import formats
from serve.answers import JobStream, run_limited, start_stream, while_connected
from serve.audio_input import Recording
from serve.errors import ApiError, bad_field
from serve.formats import Transcript
from serve.guard import FORM_BYTES
from serve.jobs import Job
from serve.pieces import Ticket
from serve.schemas import (
    ErrorBody,
    TranslationFields,
    TranslationText,
    VerboseTranslation,
    body_schema,
)
from serve.service import Service
from serve.upload import Form, read_form

router = APIRouter()

MOST_FAULTS = 100
"""More in one request are counted and not described: that takes kilobytes and microseconds each."""
MOST_NAMES = 16
"""Fields without effect that an answer names."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}(?:\[\])?")
_WRONG_KIND = ("string_type", "list_type")
_KIND = re.compile(r"(?:constrained-)?str|.*\[.*")


def _form_schema() -> dict[str, Any]:
    schema = body_schema(TranslationFields)
    schema["properties"]["file"] = {
        "type": "string",
        "format": "binary",
        "description": "The recording: WAV, FLAC, Ogg, MP3; m4a and webm where ffmpeg is installed.",
    }
    schema["required"] = ["file", *schema.get("required", [])]
    return schema


_REQUEST_BODY = {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": TranslationText | VerboseTranslation,
        "description": "The translation, in the format asked for.",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "text/vtt": {"schema": {"type": "string"}},
            "application/x-subrip": {"schema": {"type": "string"}},
            "text/event-stream": {},
        },
    },
    "4XX": {"model": ErrorBody, "description": "Refused."},
    "5XX": {"model": ErrorBody, "description": "Not possible now, or failed."},
}


def faults(error: ValidationError) -> ApiError:
    """The first fault of a request's fields, in OpenAI's shape."""
    if error.error_count() > MOST_FAULTS:
        return ApiError(400, f"The body has {error.error_count():,} faults.", code="invalid_value")
    found = error.errors(include_url=False, include_input=False)
    # What may be a text or a list has a fault for each, with the kind in its place; that of the
    # wrong kind says nothing.
    first = next((fault for fault in found if fault["type"] not in _WRONG_KIND), found[0])
    places = [str(part) for part in first["loc"]]
    param = ".".join(place for place in places if not _KIND.fullmatch(place)) or None
    # Custom validators' messages begin with the exception's name.
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param or 'The body'}: {message}.", param=param, code=str(first["type"]))


def plain_names(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a client's field names that can stand in a header, sorted, and not too many."""
    return tuple(sorted(name for name in names if _PLAIN_NAME.fullmatch(name))[:MOST_NAMES])


def read_fields(form: Form) -> tuple[TranslationFields, tuple[str, ...]]:
    """The form's fields, checked, and the names of those that have no effect.

    Raises:
        ApiError: one cannot be used.
    """
    # Tools send what their user left blank; only the model must be there.
    given = {name: text for name, text in form.fields.items() if text.strip() or name == "model"}
    try:
        fields = TranslationFields.model_validate(given)
    except ValidationError as error:
        raise faults(error) from None
    check_temperature(fields.temperature)
    if fields.stream and fields.response_format != "json":
        raise bad_field("response_format", "Streams come as json events only.")
    if form.file is None:
        raise bad_field("file", "The form has no part named file that holds the audio.")
    ignored = set(given) - set(TranslationFields.model_fields)
    if fields.prompt:
        ignored.add("prompt")
    return fields, plain_names(ignored)


def check_temperature(temperature: float | None) -> None:
    """Refuses sampling."""
    if temperature:
        raise bad_field(
            "temperature",
            "Only temperature 0 is served: the most probable translation, the same every time.",
        )


@router.post(
    "/v1/audio/translations",
    response_model=None,
    responses=_ANSWERS,
    openapi_extra={"requestBody": _REQUEST_BODY},
)
async def translate(request: Request) -> Response:
    """Translates a recording; in OpenAI's form, with to_language added."""
    service: Service = request.app.state.service
    ticket = Ticket(request.state.arrival_s)
    async with AsyncExitStack() as held:
        async with service.time_limit(ticket.arrival_s):
            form = await read_form(
                request.headers.get("content-type", ""),
                request.stream(),
                service.settings.max_upload_bytes + FORM_BYTES,
                service.directory,
            )
            held.callback(form.close)
            fields, ignored = read_fields(form)
            job = await _prepare(request, service, held, form, fields, ticket)
        job.ignored = ignored
        if fields.stream:
            events = _events(ticket.arrival_s)
            stream = await start_stream(request, service, job, events, held)
            return name_ignored(stream, job)
        transcript = await while_connected(request, run_limited(service, job))
    return _answer(transcript, fields.response_format, time.monotonic() - ticket.arrival_s)


def name_ignored(stream: Response, job: Job) -> Response:
    """A stream whose headers name the fields without effect, as those of whole answers do."""
    if job.ignored:
        stream.headers["x-halve-ignored"] = ",".join(job.ignored)
    return stream


async def _prepare(
    request: Request,
    service: Service,
    held: AsyncExitStack,
    form: Form,
    fields: TranslationFields,
    ticket: Ticket,
) -> Job:
    lending = held.enter_async_context(service.borrow(fields.model))
    model, engine = await while_connected(request, lending)
    assert form.file is not None
    return Job(
        model,
        engine,
        Recording(form.file, service.settings.max_audio_s),
        model.choose_language(fields.to_language),
        service.window_s(model),
        ticket,
        service.readers,
    )


def _events(arrival_s: float) -> Any:
    async def events(stream: JobStream) -> AsyncIterator[bytes]:
        async for text in stream.texts():
            yield formats.delta_event(text)
        yield formats.done_event(stream.transcript(), time.monotonic() - arrival_s)

    return events


def _answer(transcript: Transcript, response_format: str, elapsed_s: float) -> Response:
    headers = formats.headers(transcript, elapsed_s)
    if response_format == "json":
        return JSONResponse({"text": transcript.text}, headers=headers)
    if response_format == "verbose_json":
        return JSONResponse(formats.as_verbose(transcript).model_dump(), headers=headers)
    text, media_type = {
        "text": (transcript.text + "\n", "text/plain"),
        "srt": (formats.as_srt(transcript), "application/x-subrip"),
        "vtt": (formats.as_vtt(transcript), "text/vtt"),
    }[response_format]
    return PlainTextResponse(text, headers=headers, media_type=media_type)
