"""Translations as the formats that clients ask for."""

import json
import zlib
from dataclasses import dataclass
from typing import Any

from halve.languages import language
from serve.schemas import Segment, VerboseTranslation


@dataclass(frozen=True)
class Translated:
    """A stretch of audio and its translation."""

    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...]
    stopped: str
    """end; limit or loop where the translation was cut; silence where nothing was said."""

    @property
    def is_whole(self) -> bool:
        return self.stopped in ("end", "silence")


@dataclass(frozen=True)
class Transcript:
    """A recording's translation: its stretches in order."""

    model: str
    lang: str
    duration_s: float
    parts: tuple[Translated, ...]
    ignored: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return language(self.lang).joiner.join(part.text for part in self.parts if part.text)

    @property
    def coverage(self) -> float:
        """Share of the recording, 0 to 1, whose translation came to its own end."""
        whole = sum(part.end_s - part.start_s for part in self.parts if part.is_whole)
        return min(1.0, whole / self.duration_s) if self.duration_s else 0.0

    @property
    def is_truncated(self) -> bool:
        return any(not part.is_whole for part in self.parts)

    @property
    def token_count(self) -> int:
        return sum(len(part.tokens) for part in self.parts)


def timestamp(seconds: float, decimal: str) -> str:
    """Hours:minutes:seconds with milliseconds, as SRT (",") and WebVTT (".") write it."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, thousandths = divmod(rest, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{decimal}{thousandths:03d}"


def _cues(transcript: Transcript, decimal: str) -> list[str]:
    cues = []
    for part in transcript.parts:
        # A blank line or an arrow inside a cue would end it or start another.
        text = " ".join(part.text.split()).replace("-->", "->")
        if text:
            start, end = timestamp(part.start_s, decimal), timestamp(part.end_s, decimal)
            cues.append(f"{start} --> {end}\n{text}\n")
    return cues


def as_srt(transcript: Transcript) -> str:
    """SubRip, one cue a stretch."""
    cues = _cues(transcript, ",")
    return "\n".join(f"{number}\n{cue}" for number, cue in enumerate(cues, 1))


def as_vtt(transcript: Transcript) -> str:
    """WebVTT, one cue a stretch."""
    escaped = [_vtt_escape(cue) for cue in _cues(transcript, ".")]
    return "\n".join(["WEBVTT\n", *escaped])


def _vtt_escape(cue: str) -> str:
    times, text = cue.split("\n", 1)
    return f"{times}\n" + text.replace("&", "&amp;").replace("<", "&lt;")


def as_verbose(transcript: Transcript) -> VerboseTranslation:
    """Segments with times, and whether anything was cut."""
    segments = [
        Segment(
            id=number,
            seek=round(part.start_s * 100),
            start=round(part.start_s, 3),
            end=round(part.end_s, 3),
            text=part.text,
            tokens=list(part.tokens),
            compression_ratio=_compression_ratio(part.text),
            stopped=part.stopped,
        )
        for number, part in enumerate(transcript.parts)
    ]
    return VerboseTranslation(
        language=language(transcript.lang).name.lower(),
        duration=round(transcript.duration_s, 3),
        text=transcript.text,
        segments=segments,
        coverage=round(transcript.coverage, 4),
        truncated=transcript.is_truncated,
        model=transcript.model,
        ignored=list(transcript.ignored),
    )


def _compression_ratio(text: str) -> float:
    raw = text.encode()
    return round(len(raw) / len(zlib.compress(raw)), 3)


def heard(transcript: Transcript) -> dict[str, Any]:
    """How much of the audio a text covers, for answers whose headers are gone before that is known."""
    return {
        "halve": {
            "duration": round(transcript.duration_s, 3),
            "coverage": round(transcript.coverage, 4),
        }
    }


def headers(transcript: Transcript, elapsed_s: float) -> dict[str, str]:
    """What every format is sent with, so that plain text too says what it covers."""
    found = {
        "x-halve-coverage": f"{transcript.coverage:.4f}",
        "x-halve-audio-seconds": f"{transcript.duration_s:.3f}",
        "x-halve-processing-ms": f"{elapsed_s * 1000:.0f}",
        "x-halve-tokens": str(transcript.token_count),
        "x-halve-language": transcript.lang,
    }
    if transcript.ignored:
        found["x-halve-ignored"] = ",".join(transcript.ignored)
    return found


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def delta_event(text: str) -> bytes:
    """More of the translation, as OpenAI's audio API streams it."""
    return event({"type": "transcript.text.delta", "delta": text})


def done_event(transcript: Transcript, elapsed_s: float) -> bytes:
    """The whole translation, and what it covers."""
    verbose = as_verbose(transcript)
    extra = verbose.model_dump(include={"segments", "coverage", "truncated", "duration", "ignored"})
    return event(
        {
            "type": "transcript.text.done",
            "text": transcript.text,
            **extra,
            "processing_ms": round(elapsed_s * 1000),
        }
    )
