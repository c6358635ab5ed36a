"""Every failure in OpenAI's error format, and what a gRPC status of the server means to a client."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from echo_trt.gateway.names import Names

log = logging.getLogger("echo_trt.gateway")
SHOWN = 100  # characters at most of a value, or of a field's name, that an error repeats


class ApiError(HTTPException):
    """One sentence for the client, with the HTTP status it goes out under."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        headers = dict(self.headers or {})
        if self.retry_after:
            headers["Retry-After"] = str(self.retry_after)
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status_code, headers)


def overloaded() -> ApiError:
    """429: the queue is full."""
    message = "The server's queue is full; retry in a second."
    return ApiError(429, message, "rate_limit_error", code="queue_full", retry_after=1)


def unavailable() -> ApiError:
    """503: the engine is starting, stopping or gone."""
    return ApiError(503, "The engine is not available; retry in a few seconds.", "server_error", retry_after=5)


def from_grpc(code: str, details: str, names: Names | None = None) -> ApiError:
    """Translate a gRPC status, by its name. What a client cannot act on is logged here and not told outside.

    ``names`` are those of the request's fields.
    """
    if code == "INVALID_ARGUMENT":
        names = names or Names()
        sentence, field = names.told(details)
        if "maximum context length" in details:
            return ApiError(400, sentence, param=names.prompt, code="context_length_exceeded")
        return ApiError(400, sentence, param=field)
    if code == "UNAVAILABLE" and "queue" in details.lower():
        return overloaded()
    if code == "DEADLINE_EXCEEDED":
        return ApiError(504, "The request's deadline passed before it was finished.", "server_error", code="deadline")
    log.error("upstream: %s %s", code, details)
    if code in ("UNAVAILABLE", "NOT_FOUND", "CANCELLED"):
        return unavailable()
    return ApiError(500, "The engine failed at this request; the server's log says why.", "server_error")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as a sentence that names the field and the value."""
    first = errors[0]
    if not first["loc"]:
        return no_object()
    param = ".".join(_cut(str(part)) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing.", param=param)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not known here; leave it out.", param=param)
    return ApiError(400, f"{param} is {shown(first['input'])}: {reason}.", param=param)


def no_object() -> ApiError:
    """400: the body is no JSON object, or does not say that it is one."""
    return ApiError(400, "The body must be a JSON object, sent as application/json.")


def shown(value: object) -> str:
    """A value of a JSON document in a few words, at the same cost whatever its size."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str):
        return _cut(ascii(value[: SHOWN + 1]))
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else _cut(ascii(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
