"""The clients of a soak: most ask properly, some send harmful files, some leave."""

import asyncio
import base64
import contextlib
import html
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.soak_audio import MAY_BE_HEARD, Sound

HOSTILE_SHARE = 0.10
LEAVING_SHARE = 0.05
LONG_SHARE = 0.02
CHAT_SHARE = 0.15
LEAVE_WITHIN_S = 0.5
FORMATS = ("json", "text", "verbose_json", "srt", "vtt", "stream")
REFUSED_FOR_NOW = frozenset({429, 503})
PAUSE_S = 0.2
"""After a refusal for now."""


@dataclass(frozen=True)
class Answer:
    """A translation that came back."""

    sound: str
    text: str
    segments: tuple[tuple[float, float, str], ...] = ()
    """Start, end and text of each stretch, for audio longer than the model's window."""


@dataclass
class Record:
    """What came back in a soak."""

    answers: list[Answer] = field(default_factory=list)
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    """By kind of request: well-formed, hostile, leaving."""
    faults: list[str] = field(default_factory=list)
    """What must not happen."""
    latencies_ms: list[float] = field(default_factory=list)
    refused_connections: int = 0
    """Requests begun after the server had been told to stop, of which nothing was answered."""

    def count(self, kind: str, status: object) -> None:
        """Counts an answer."""
        self.statuses.setdefault(kind, Counter())[str(status)] += 1


@dataclass(frozen=True)
class Stock:
    """What clients choose from."""

    short: Sequence[Sound]
    long: Sequence[Sound]
    hostile: Mapping[str, bytes]


class Client:
    """One client: a request after another until it is told to stop, or the server is gone."""

    def __init__(self, url: str, models: Sequence[str], lang: str, stock: Stock, seed: int) -> None:
        self._url = url
        self._models = models
        self._lang = lang
        self._stock = stock
        self._choice = random.Random(seed)
        self._is_answered = False

    async def run(self, record: Record, until_s: float, stopping: asyncio.Event) -> None:
        """Sends until `until_s` (monotonic), or until the server, told to stop, hangs up."""
        async with httpx.AsyncClient(
            base_url=self._url,
            timeout=300.0,
            trust_env=False,
            verify=False,
            event_hooks={"response": [self._note_answer]},
        ) as http:
            while time.monotonic() < until_s:
                begun_after_stop, self._is_answered = stopping.is_set(), False
                try:
                    await self._one(http, record)
                except httpx.HTTPError as error:
                    # An answer that had begun was of a request that the server had accepted.
                    if begun_after_stop and not self._is_answered:
                        record.refused_connections += 1
                        return
                    record.faults.append(f"a request was lost: {type(error).__name__} {error}")

    async def _note_answer(self, answer: httpx.Response) -> None:
        self._is_answered = True

    async def _one(self, http: httpx.AsyncClient, record: Record) -> None:
        chance = self._choice.random()
        if chance < HOSTILE_SHARE:
            await self._hostile(http, record)
        elif chance < HOSTILE_SHARE + LEAVING_SHARE:
            await self._leave(http, record)
        else:
            await self._good(http, record)

    async def _good(self, http: httpx.AsyncClient, record: Record) -> None:
        started_s = time.monotonic()
        chance = self._choice.random()
        if chance < LONG_SHARE:
            sound, ask = self._choice.choice(self._stock.long), "verbose_json"
        else:
            sound = self._choice.choice(self._stock.short)
            is_chat = chance < LONG_SHARE + CHAT_SHARE
            ask = self._choice.choice(("chat", "chat stream") if is_chat else FORMATS)
        answer = await http.send(self._request(http, sound, ask))
        record.count("well-formed", answer.status_code)
        if answer.status_code == 200:
            record.latencies_ms.append(1000 * (time.monotonic() - started_s))
            if broken := _broken_stream(answer) if "stream" in ask else "":
                record.faults.append(f"{ask} of {sound.name} ended with {broken}")
            else:
                record.answers.append(_read(sound.name, ask, answer))
        elif answer.status_code in REFUSED_FOR_NOW and "retry-after" in answer.headers:
            await asyncio.sleep(PAUSE_S)
        else:
            record.faults.append(f"{ask} of {sound.name}: {answer.status_code} {answer.text[:200]}")

    def _request(self, http: httpx.AsyncClient, sound: Sound, ask: str) -> httpx.Request:
        model = self._choice.choice(self._models)
        if ask.startswith("chat"):
            body = self._chat_body(model, sound.content)
            return http.build_request(
                "POST", "/v1/chat/completions", json={**body, "stream": ask == "chat stream"}
            )
        data = {"model": model, "to_language": self._lang}
        data |= {"stream": "true"} if ask == "stream" else {"response_format": ask}
        files = {"file": (sound.name, sound.content)}
        return http.build_request("POST", "/v1/audio/translations", data=data, files=files)

    def _chat_body(self, model: str, content: bytes) -> dict[str, Any]:
        audio = {"data": base64.b64encode(content).decode(), "format": "wav"}
        parts = [
            {"type": "text", "text": "Translate the speech."},
            {"type": "input_audio", "input_audio": audio},
        ]
        message = {"role": "user", "content": parts}
        return {"model": model, "to_language": self._lang, "messages": [message]}

    async def _hostile(self, http: httpx.AsyncClient, record: Record) -> None:
        name = self._choice.choice([*self._stock.hostile, *ODD_REQUESTS])
        if name in self._stock.hostile:
            data = {"model": self._models[0], "to_language": self._lang}
            files = {"file": ("talk.wav", self._stock.hostile[name])}
            request = http.build_request("POST", "/v1/audio/translations", data=data, files=files)
        else:
            request = ODD_REQUESTS[name](http, self._models[0], self._stock.short[0].content)
        answer = await http.send(request)
        record.count("hostile", answer.status_code)
        is_refused = 400 <= answer.status_code < 500 or answer.status_code == 503
        if not is_refused and not (answer.status_code == 200 and name in MAY_BE_HEARD):
            record.faults.append(f"hostile {name}: {answer.status_code} {answer.text[:200]}")
        if is_refused and set(answer.json()["error"]) != {"message", "type", "param", "code"}:
            record.faults.append(f"hostile {name}: not OpenAI's error shape: {answer.text[:200]}")

    async def _leave(self, http: httpx.AsyncClient, record: Record) -> None:
        """Sends a request, or half of one, and hangs up at some moment."""
        sound = self._choice.choice([*self._stock.short, *self._stock.long])
        request = self._request(http, sound, self._choice.choice(FORMATS))
        body = await request.aread()
        share = self._choice.choice((0.5, 1.0, 1.0))
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        address = urlsplit(self._url)
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            path = request.url.path
            writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode())
            writer.write(body[: int(len(body) * share)])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(100), self._choice.random() * LEAVE_WITHIN_S)
            writer.close()
        record.count("leaving", "left")


def _form(http: httpx.AsyncClient, content: bytes, **fields: str) -> httpx.Request:
    files = {"file": ("a.wav", content)}
    return http.build_request("POST", "/v1/audio/translations", data=fields, files=files)


def _raw(http: httpx.AsyncClient, path: str, body: bytes, kind: str) -> httpx.Request:
    return http.build_request("POST", path, content=body, headers={"content-type": kind})


_FORM_KIND = "multipart/form-data; boundary=x"
_CHAT = "/v1/chat/completions"
_AUDIO = "/v1/audio/translations"
ODD_REQUESTS: Mapping[str, Any] = {
    "no such model": lambda http, model, wav: _form(http, wav, model="../../etc/passwd"),
    "no model": lambda http, model, wav: _form(http, wav),
    "a temperature": lambda http, model, wav: _form(http, wav, model=model, temperature="0.7"),
    "no such language": lambda http, model, wav: _form(http, wav, model=model, to_language="xx"),
    "a huge field": lambda http, model, wav: _form(http, wav, model=model, prompt="x" * 200_000),
    "a broken form": lambda http, model, wav: _raw(http, _AUDIO, b"--x\r\n\r\n--y", _FORM_KIND),
    "not a form": lambda http, model, wav: _raw(http, _AUDIO, wav, "audio/wav"),
    "not JSON": lambda http, model, wav: _raw(http, _CHAT, b"[" * 100_000, "application/json"),
    "not base64": lambda http, model, wav: http.build_request(
        "POST",
        _CHAT,
        json={
            "model": model,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "input_audio", "input_audio": {"data": "%%%%"}}],
                }
            ],
        },
    ),
}
"""Requests that are wrong in themselves."""


def _read(name: str, ask: str, answer: httpx.Response) -> Answer:
    if ask in ("text", "srt", "vtt"):
        lines = answer.text.splitlines()
        cues = [line for line in lines if "-->" not in line and not line.isdigit()]
        lines = lines if ask == "text" else cues[ask == "vtt" :]
        text = " ".join(" ".join(lines).split())
        return Answer(name, html.unescape(text) if ask == "vtt" else text)
    if ask == "stream":
        events = _events(answer.text)
        told = "".join(event.get("delta", "") for event in events)
        done = str(events[-1]["text"])
        return Answer(name, done if told == done else f"streamed {told!r}, then said {done!r}")
    if ask == "chat stream":
        chunks = [chunk for chunk in _events(answer.text) if chunk["choices"]]
        parts = (chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        return Answer(name, "".join(parts))
    found = answer.json()
    if ask == "chat":
        return Answer(name, found["choices"][0]["message"]["content"])
    segments = found.get("segments", [])
    times = tuple((part["start"], part["end"], part["text"]) for part in segments)
    return Answer(name, found["text"], times)


def _broken_stream(answer: httpx.Response) -> str:
    """The event that a stream which did not come to its end ended with."""
    events = _events(answer.text)
    if not events:
        return "nothing"
    return str(events[-1])[:200] if "error" in events[-1] else ""


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]
