"""What every request meets first: names, keys, limits; and what every answer carries.

Written against ASGI, before any framework code reads a byte of the body.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from serve.errors import ApiError, busy, draining, internal, too_large
from serve.service import Service

log = logging.getLogger("halve.serve")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
KEYED = ("/v1/", "/metrics")
"""Paths that need the API key, where there is one."""
ENDPOINTS = frozenset(
    {"/v1/audio/translations", "/v1/chat/completions", "/v1/models"}
    | {"/health", "/ready", "/metrics", "/openapi.json", "/"}
)
FORM_BYTES = 64 * 1024
"""What a form may hold around the file."""
DISCARD_S = 2.0
"""A refused upload is read and thrown away this long, so that its client hears the refusal."""
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        is_work = scope["method"] == "POST" and scope["path"].startswith("/v1/")
        service = self._service
        try:
            self._check(scope, Headers(scope=scope), is_work)
            service.running += is_work
            service.metrics.running.set(service.running)
            try:
                await self._app(scope, exchange.receive, exchange.send)
            finally:
                service.running -= is_work
                service.metrics.running.set(service.running)
        except ApiError as refusal:
            await exchange.answer(refusal)
        except ClientDisconnect:
            exchange.status = exchange.status or 499
        except Exception:
            log.exception("request %s failed", exchange.id)
            await exchange.answer(internal())
        finally:
            self._count(scope, exchange)

    def _check(self, scope: Message, headers: Headers, is_work: bool) -> None:
        self._check_names(scope, headers)
        if scope["path"].startswith(KEYED) and scope["method"] != "OPTIONS":
            self._check_key(headers)
        if not is_work:
            return
        settings = self._service.settings
        if self._service.is_draining:
            raise draining()
        if self._service.running >= settings.max_concurrent:
            raise busy(f"The server has {self._service.running} requests in hand; try again later.")
        length = headers.get("content-length", "0")
        # Base64 makes a file a third longer.
        most = settings.max_upload_bytes * 4 // 3 + FORM_BYTES
        if not length.isdigit() or int(length[:20]) > most:
            raise too_large(settings.max_upload_bytes)

    def _check_names(self, scope: Message, headers: Headers) -> None:
        """Against pages elsewhere that talk to this machine through its user's browser."""
        settings = self._service.settings
        host = headers.get("host", "")
        name = _host_name(host)
        allowed = {settings.host.lower(), *map(str.lower, settings.allow_hosts)}
        if settings.is_loopback and name not in LOCAL_HOSTS | allowed:
            raise ApiError(
                403, "This server does not go by that name.", code="unknown_host", param="host"
            )
        origin = headers.get("origin")
        if origin is None or {origin, "*"} & set(settings.allow_origins):
            return
        if scope["method"] == "POST" and _address(origin) != host.lower():
            raise ApiError(
                403, "Web pages from elsewhere may not use this server.", code="unknown_origin"
            )

    def _check_key(self, headers: Headers) -> None:
        key = self._service.api_key
        if key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digests = [hashlib.sha256(text.strip().encode()).digest() for text in (given, key)]
        if not (hmac.compare_digest(*digests) and scheme.lower() == "bearer"):
            raise ApiError(
                401,
                "Send this server's API key as a bearer token.",
                kind="authentication_error",
                code="invalid_api_key",
            )

    def _count(self, scope: Message, exchange: "_Exchange") -> None:
        path = scope["path"]
        endpoint = path if path in ENDPOINTS else "other"
        metrics = self._service.metrics
        if exchange.status == 500:
            log.error("request %s: 500, for what was logged before", exchange.id)
        metrics.requests.labels(endpoint, str(exchange.status)).inc()
        metrics.latency.labels(endpoint).observe(time.monotonic() - exchange.arrival_s)


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _address(origin: str) -> str | None:
    """The host and port of an origin; None where it is no URL."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


class _Exchange:
    """One request and its answer, watched."""

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.id = uuid.uuid4().hex
        self.arrival_s = time.monotonic()
        self.status = 0
        """0 until an answer began."""
        self._receive = receive
        self._send = send
        headers = Headers(scope=scope)
        # A client that waits for "100 continue" has sent nothing yet.
        waits = headers.get("expect", "").lower() == "100-continue"
        has_body = "content-length" in headers or "transfer-encoding" in headers
        self._unread = has_body and not waits
        scope.setdefault("state", {})["arrival_s"] = self.arrival_s

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._unread:
                await self._discard()
            headers = Headers(raw=list(message.get("headers", [])))
            extra = {"x-request-id": self.id, **SECURITY_HEADERS}
            added = [(k.encode(), v.encode()) for k, v in extra.items() if k not in headers]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)

    async def answer(self, refusal: ApiError) -> None:
        """Sends a refusal, unless an answer has begun."""
        if self.status:
            return
        body = json.dumps(refusal.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))}
        headers |= refusal.headers()
        raw = [(k.encode(), v.encode()) for k, v in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    async def _discard(self) -> None:
        try:
            async with asyncio.timeout(DISCARD_S):
                while self._unread:
                    await self.receive()
        except TimeoutError:
            return
