"""Reads the bodies of requests without holding up other clients: all run on one event loop."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from echo_trt.server.errors import ApiError, from_validation, no_object, shown
from echo_trt.server.fields import LONGEST, READING, Reading, Strict
from echo_trt.server.options import LONGEST as LONGEST_NAME

#: Most opening brackets in a body, those in texts included. Each may become a list or a dict, which take the most time:
#: parsing a megabyte of empty lists holds the loop for 100 ms, as many lists as this for 30 ms.
BRACKETS = 50_000
Body = TypeVar("Body", bound=Strict)


def reads(kind: type[Body]) -> Callable[[Callable[[Request, Body], Awaitable[Response]]], Any]:
    """Make an endpoint of a function of a request and its body, a ``kind``, which names the model that is served."""

    def endpoint_of(answer: Callable[[Request, Body], Awaitable[Response]]) -> Any:
        async def endpoint(request: Request) -> Response:
            requested, request.state.ignored = await request.app.state.bodies.read(request, kind)
            request.scope["record"].ignored = request.state.ignored
            if "model" in kind.model_fields:
                requested.model = model_of(request, requested.model)
            return with_ignored(await answer(request, requested), request)

        endpoint.body = kind  # type: ignore[attr-defined]
        return endpoint

    return endpoint_of


def model_of(request: Request, name: str | None) -> str:
    """Return the name that an answer has, the first one's where a request has none. Raises ApiError for another."""
    names = request.app.state.names
    if name and name not in names and not (request.app.state.any_name and len(name) <= LONGEST_NAME):
        known = " or ".join(f"'{each}'" for each in names[:4])
        near = difflib.get_close_matches(name[:80], names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        message = f"The model {name[:80]!a} does not exist here{hint}; ask for {known}."
        raise ApiError(404, message, param="model", code="model_not_found")
    return name or names[0]


def with_ignored(response: Response, request: Request) -> Response:
    """Name the fields that had no effect in an answer or a refusal."""
    if ignored := getattr(request.state, "ignored", ""):
        response.headers["X-Fields-Ignored"] = ignored
    return response


class Bodies:
    """Bodies are parsed one at a time, and after each the loop is free for as long as that took.

    So clients who send nothing but large bodies leave half of the loop to the others. Threads would not help: neither
    the parser nor pydantic lets another thread run meanwhile.
    """

    def __init__(self, largest: int, strict_fields: bool = False):
        """``largest``: bytes of a body, and of a body times its ``n``."""
        self._largest, self._strict, self._turn = largest, strict_fields, asyncio.Lock()

    async def read(self, request: Request, kind: type[Body]) -> tuple[Body, str]:
        """Read a request's body as a ``kind``, and the names of fields that had no effect. Raises ApiError."""
        body, reading = await request.body(), Reading(self._strict)
        _check_type(request)
        async with self._turn:
            begin, token = time.monotonic(), READING.set(reading)
            try:
                requested = parsed(body, kind)
            finally:
                READING.reset(token)
                await asyncio.sleep(time.monotonic() - begin)
        n = getattr(requested, "n", 1)
        if n > 1 and n * len(body) > self._largest:  # the engine is sent the prompt for each choice
            maximum = max(self._largest // len(body), 1)
            message = f"n is {n} for a body of {len(body)} bytes; ask for at most {maximum} choices."
            raise ApiError(400, message, param="n")
        ignored = ", ".join(ascii(name[:LONGEST])[1:-1] for name in reading.ignored)
        return requested, ignored.strip()  # a header's value has no blank at its ends


def _check_type(request: Request) -> None:
    """Refuse what a web page may send without asking first; Ollama's clients name any type. Raises ApiError."""
    if encoding := request.headers.get("content-encoding", "identity").lower().replace("identity", ""):
        raise ApiError(400, f"Content-Encoding is {shown(encoding)}; send the body as it is, without compression.")
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.scope["path"].startswith("/api/") and "origin" not in request.headers:
        return
    if media != "application/json" and not media.endswith("+json"):
        raise no_object()


def parsed(body: bytes, kind: type[Body]) -> Body:
    """Parse a JSON object as a ``kind``. Takes at most some dozens of milliseconds per megabyte. Raises ApiError."""
    if body.count(b"[") + body.count(b"{") > BRACKETS:
        raise ApiError(400, f"The body has more than {BRACKETS} opening brackets; send fewer lists and objects.")
    try:
        return kind.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:  # which is a ValueError too
        raise from_validation(error.errors(include_url=False)) from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None
