"""Refusals in the shape that OpenAI's clients understand.

Messages are written here and never taken from an exception: those may name files of the server.
"""

from typing import Any

RETRY_AFTER_S = 2


class ApiError(Exception):
    """An answer other than 200, with what the client should know and nothing more."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Retry-After, where trying again makes sense; OpenAI's clients try all else from 500 on again unless told."""
        if self.retry_after_s is not None:
            return {"retry-after": str(self.retry_after_s)}
        return {"x-should-retry": "false"} if self.code == "timeout" else {}


def bad_field(param: str, message: str) -> ApiError:
    """A request whose field `param` cannot be used."""
    return ApiError(400, message, param=param, code="invalid_value")


def bad_audio(message: str, code: str = "invalid_audio") -> ApiError:
    """Audio that was received but cannot be used."""
    return ApiError(422, message, param="file", code=code)


def too_large(limit_bytes: int) -> ApiError:
    """An upload beyond the limit."""
    return ApiError(
        413, f"The request is larger than {limit_bytes:,} bytes.", code="request_too_large"
    )


def busy(message: str) -> ApiError:
    """No place in the queue."""
    return ApiError(
        429, message, kind="rate_limit_error", code="queue_full", retry_after_s=RETRY_AFTER_S
    )


def draining() -> ApiError:
    """The server is stopping."""
    return ApiError(
        503,
        "The server is shutting down; send the request to another one or try again later.",
        kind="server_error",
        code="shutting_down",
        retry_after_s=RETRY_AFTER_S,
    )


def unavailable(
    message: str, code: str = "model_unavailable", retry_after_s: int = RETRY_AFTER_S
) -> ApiError:
    """The server cannot do this now."""
    return ApiError(503, message, kind="server_error", code=code, retry_after_s=retry_after_s)


def too_slow(limit_s: float) -> ApiError:
    """A request that took longer than it may."""
    return ApiError(
        504, f"The request took longer than {limit_s:g} s.", kind="server_error", code="timeout"
    )


def internal() -> ApiError:
    """Something that should not have happened; the details are in the server's log."""
    return ApiError(
        500,
        "The server failed on this request. Its log says more, at the time of this request and its x-request-id.",
        kind="server_error",
        code="internal_error",
    )
