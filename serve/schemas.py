"""What clients send and what they get, as OpenAI's API has it, with halve's additions marked."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ResponseFormat = Literal["json", "text", "verbose_json", "srt", "vtt"]

MOST_TEXT = 100_000
"""Characters of one text in a chat: a translation of two hours, sent back as history."""
MOST_PARTS = 100
"""Parts of one chat message."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class _Request(BaseModel):
    # Tools send fields of their own; those not known here are named in x-halve-ignored.
    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


class TranslationFields(_Request):
    """The text fields of the form sent to /v1/audio/translations."""

    model: str = Field(min_length=1, max_length=200)
    """A model's id, as in /v1/models."""
    to_language: str | None = Field(default=None, min_length=2, max_length=20)
    """Language to translate into, ISO 639-1 (halve's addition); default: the model's first."""
    prompt: str | None = None
    """Ignored, and named in x-halve-ignored: the models know one prompt a language."""
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    """0 only: the most probable translation, the same every time."""
    response_format: ResponseFormat = "json"
    stream: bool = False
    """Server-sent events transcript.text.delta and transcript.text.done (with json only)."""


class InputAudio(_Request):
    data: str
    """The file, base64."""
    format: str | None = Field(default=None, max_length=20)
    """Not needed: the file's first bytes decide."""

    @field_validator("data")
    @classmethod
    def _ascii(cls, value: str) -> str:
        # One other letter can make a text take four times the bytes that it came in.
        if not value.isascii():
            raise ValueError("not base64")
        return value


class AudioPart(_Request):
    type: Literal["input_audio"]
    input_audio: InputAudio


class TextPart(_Request):
    type: Literal["text"]
    text: str = Field(max_length=MOST_TEXT)


Part = Annotated[AudioPart | TextPart, Field(discriminator="type")]
# One fault is answered: a list of a million wrong items must not make a million of them.
Parts = Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MOST_TEXT)] | Parts | None = None


class StreamOptions(_Request):
    include_usage: bool | None = False


class ChatRequest(_Request):
    """The body sent to /v1/chat/completions: one recording in one of the messages."""

    # Unlike "ignore" this keeps the names, for x-halve-ignored.
    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1, max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=200, fail_fast=True)
    to_language: str | None = Field(default=None, min_length=2, max_length=20)
    """Language to translate into (halve's addition); default: the one that the recording's message
    names, else the one that the other messages name, else the model's first."""
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    """0 or absent."""
    n: Literal[1] | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=100_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=100_000)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, max_length=4, fail_fast=True)
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(default=None, max_length=0)
    response_format: dict[str, Any] | None = None

    @field_validator("to_language", mode="before")
    @classmethod
    def _blank(cls, value: Any) -> Any:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise ValueError("only {'type': 'text'}")
        return value


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "halve"
    loaded: bool
    languages: list[str] | None
    """Languages it translates into; null until known."""
    default_language: str | None
    """The one used when a request names none; null: requests must name one."""
    max_audio_s: float | None
    """Longest stretch it hears at once; longer audio is split."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TranslationText(BaseModel):
    text: str


class Segment(BaseModel):
    """One stretch. OpenAI's fields, 0 where halve does not measure it: some clients read no null."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float
    no_speech_prob: float = 0.0
    stopped: str
    """end, limit, loop, or silence (halve's addition)."""


class VerboseTranslation(BaseModel):
    task: Literal["translate"] = "translate"
    language: str
    """The language translated into, in English."""
    duration: float
    text: str
    segments: list[Segment]
    coverage: float
    """Share of the audio whose translation is whole (halve's addition)."""
    truncated: bool
    """Whether a stretch's translation was cut: at its token limit, or in a repetition (halve's addition)."""
    model: str
    ignored: list[str]
    """Fields of the request that had no effect (halve's addition)."""


_COMPONENTS = "#/components/schemas/{model}"


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that is read by hand; what it refers to is in `definitions`."""
    schema = model.model_json_schema(ref_template=_COMPONENTS)
    schema.pop("$defs", None)
    return schema


def definitions() -> dict[str, Any]:
    """The schemas that bodies read by hand refer to."""
    found: dict[str, Any] = {}
    for model in (TranslationFields, ChatRequest):
        found |= model.model_json_schema(ref_template=_COMPONENTS).get("$defs", {})
    return found
