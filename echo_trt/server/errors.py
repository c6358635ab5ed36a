"""Every failure in the format of OpenAI, Anthropic or Ollama, and what an engine's failure means to a client."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Scope
from typing_extensions import TypedDict

from echo_trt.engine.process.wire import Failure

#: A schema that does not compile, in a grammar that was made here: its line, and what is wrong.
_GRAMMAR_LINE = re.compile(r"\(at (\d+)\(\d+\): failed to compile JSON schema: (.*?) \d+ \| .*\);", re.DOTALL)
#: Anthropic's types of errors by status; others are "api_error".
ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
REFUSED_FIELD = "refused_field"  # pydantic's type of an error that names a field of its own
SHOWN = 100  # characters at most of a value, or of a field's name, that an error repeats


class OpenAIError(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIFailure(TypedDict):
    """A refusal or a failure, in a stream too."""

    error: OpenAIError


class AnthropicError(TypedDict):
    type: str
    message: str


class AnthropicFailure(TypedDict):
    """A refusal or a failure, in a stream too."""

    type: Literal["error"]
    error: AnthropicError


class OllamaFailure(TypedDict):
    """A refusal or a failure, in a stream too."""

    error: str


AnyFailure = OpenAIFailure | AnthropicFailure | OllamaFailure


class ApiError(HTTPException):
    """One sentence for the client, with the HTTP status it goes out under. ``reason``: what the log says beside it."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str = "",
    ):
        super().__init__(status, message, headers)
        self.retry_after, self.reason = retry_after, reason
        self.body: OpenAIFailure = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def body_for(self, path: str) -> AnyFailure:
        """Return the body in the form of the API that ``path`` belongs to."""
        message, form = self.body["error"]["message"], failure_type(path)
        if form is OllamaFailure:
            return {"error": message}
        if form is AnthropicFailure:
            kind = ANTHROPIC.get(self.status_code, "api_error")
            return {"type": "error", "error": {"type": kind, "message": message}}
        return self.body

    def logged(self) -> dict[str, Any]:
        """Return what the log tells of it. (The error itself would keep the request's body, by its traceback.)"""
        field = self.body["error"]["param"]
        return {"status": self.status_code, "field": field, "error": self.detail, "reason": self.reason}

    def response(self, scope: Scope) -> JSONResponse:
        """Return the answer to the request of an ASGI scope, whose line of the log tells it too."""
        if record := scope.get("record"):
            record.error = self.logged()
        headers = dict(self.headers or {})
        if self.retry_after:
            headers["Retry-After"] = str(self.retry_after)
        if self.status_code == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body_for(scope["path"]), self.status_code, headers)


def failure_type(path: str) -> type[AnyFailure]:
    """Return the form of failures of the API that ``path`` belongs to."""
    if path.startswith("/api/"):
        return OllamaFailure
    return AnthropicFailure if path == "/v1/messages" or path.startswith("/v1/messages/") else OpenAIFailure


def unavailable(reason: str = "") -> ApiError:
    """503: the engine is starting, stopping or gone."""
    message = "The engine is not available; retry in a few seconds."
    return ApiError(503, message, "server_error", retry_after=5, reason=reason)


def stopped() -> ApiError:
    """503: the server ends, and the time for answers in flight is over."""
    message = "The server stopped before this answer was finished; ask again in a few seconds."
    return ApiError(503, message, "server_error", retry_after=5)


def full() -> ApiError:
    """503: requests of others are answered on all connections."""
    message, headers = "All connections of this server are in use; retry in a second.", {"Connection": "close"}
    return ApiError(503, message, "server_error", code="connections", retry_after=1, headers=headers)


def from_engine(failure: Failure, names: Mapping[str, str] | None = None) -> ApiError:
    """Translate an engine's failure. What a client cannot act on is the log's ``reason`` and not told outside.

    names  a parameter of the engine -> the client's field, where they differ; "structured:LINE" of a grammar's lines
    """
    sentence, seconds = failure.message, failure.retry_after
    match failure.kind:
        case "invalid" | "too_long":
            return _refused(failure, names or {})
        case "queue_full":
            message = "The server's queue is full; retry in a second."
            return ApiError(429, message, "rate_limit_error", code="queue_full", retry_after=seconds)
        case "away" | "cancelled":
            return unavailable(f"{failure.kind}: {sentence}")
        case "failed":
            message = "The engine failed at this request; the server's log says why."
            return ApiError(500, message, "server_error", reason=sentence)


def _refused(failure: Failure, names: Mapping[str, str]) -> ApiError:
    sentence, field = failure.message, names.get(failure.field or "", failure.field)
    if (found := _GRAMMAR_LINE.search(sentence)) and (name := names.get(f"structured:{found[1]}")):
        field, sentence = name, sentence.replace(found[0], f"({found[2]});")
    if field and failure.field and field != failure.field and sentence.startswith(failure.field):
        sentence = f"{field} {sentence.partition(' ')[2]}"
    return ApiError(400, sentence, param=field, code="context_length_exceeded" if failure.kind == "too_long" else None)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Turn the first of pydantic's errors into a sentence that names the field and the value."""
    first = errors[0]
    if first["type"] == REFUSED_FIELD:
        param = ".".join(_cut(str(part)) for part in (*first["loc"], first["ctx"]["name"]))
        return ApiError(400, f"{param} {first['ctx']['why']}", param=param)
    if not first["loc"]:
        return no_object()
    param = ".".join(_cut(str(part)) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing.", param=param)
    return ApiError(400, f"{param} is {shown(first['input'])}: {reason}.", param=param)


def wrong(field: str, value: object, remedy: str) -> ApiError:
    """400: a field has a value that it may not have."""
    return ApiError(400, f"{field} is {shown(value)}: {remedy}.", param=field)


def no_object() -> ApiError:
    """400: the body is no JSON object, or does not say that it is one."""
    return ApiError(400, "The body must be a JSON object, sent as application/json.")


def shown(value: object) -> str:
    """Shorten a value of a JSON document to a few words, at the same cost whatever its size."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str):
        return _cut(ascii(value[: SHOWN + 1]))
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else _cut(ascii(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
