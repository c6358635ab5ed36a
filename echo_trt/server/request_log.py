"""A line of the log for each request: who asked what, how it ended, tokens and times; never text."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo_trt.files.log import REQUEST_ID
from echo_trt.server.edge import OPEN
from echo_trt.server.errors import ApiError, stopped
from echo_trt.server.keys import Keys

if TYPE_CHECKING:
    from echo_trt.server.answers import Answer

log = logging.getLogger(__name__)
HUNG_UP = 499  # the status of an answer that nobody waits for, in logs and metrics only
EVERY_S = 10  # seconds in which equal lines become one; larger: fewer lines, later
DISTINCT = 64  # lines, each of its own kind, in so many seconds; larger: a client that varies its mistakes fills more
LONGEST = 200  # characters of a path, a user agent or a sentence
KIND = ("method", "path", "status", "field", "error", "reason")  # in which equal lines are equal
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # of a client, that is sent back
#: What a sentence repeats of a body: values in quotation marks, whose end may be cut off, and details in brackets.
_REPEATED = re.compile(r"""(?<!\w)'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$)|\((?:.*\)|.*)""", re.DOTALL)


@dataclass
class RequestRecord:
    """What is known of a request, in its ASGI scope as "record".

    status  0: no answer has begun
    error   what it was refused with, as ``ApiError.logged``
    ignored  names of fields that had no effect
    answer  the engine's
    """

    id: str
    status: int = 0
    error: dict[str, Any] = field(default_factory=dict)
    ignored: str = ""
    answer: Answer[Any] | None = None


class RequestLines:
    """Writes lines of requests. Of equal ones the first is written at once, and then how many more came in EVERY_S.

    ``whole``: whether requests that ended well have lines. Used within one event loop.
    """

    def __init__(self, whole: bool = True):
        self._whole, self._repeated = whole, dict[Any, Repeated]()

    def write(self, fields: dict[str, Any], apart: bool = False) -> None:
        """Write the line of a request by its ``status`` and other fields; ``apart``: also beside an equal one."""
        level, message = _told_as(fields["status"])
        if (level > logging.INFO or self._whole) and (apart or self._is_first(fields, level)):
            log.log(level, message, extra={"fields": fields})

    def close(self) -> None:
        """Write what was counted."""
        for repeated in self._repeated.values():
            repeated.timer.cancel()
            repeated.tell()
        self._repeated.clear()

    def _is_first(self, fields: dict[str, Any], level: int) -> bool:
        kind = {name: fields[name] for name in KIND if fields.get(name) is not None}
        key: Any = tuple(kind.items())
        if key not in self._repeated and len(self._repeated) >= DISTINCT:
            key, kind = None, {}
        first = key not in self._repeated
        if first:
            self._wait(key, kind, level)
        if not first or key is None:
            self._repeated[key].number += 1
            self._repeated[key].level = max(self._repeated[key].level, level)
        return first and key is not None

    def _wait(self, key: Any, kind: dict[str, Any], level: int) -> None:
        timer = asyncio.get_running_loop().call_later(EVERY_S, self._end, key)
        self._repeated[key] = Repeated(kind, level, timer, time.monotonic())

    def _end(self, key: Any) -> None:
        repeated = self._repeated.pop(key)
        repeated.tell()
        if repeated.number and key is not None:
            self._wait(key, repeated.kind, repeated.level)


@dataclass
class Repeated:
    """Lines that were not written since the first of their ``kind``; without a kind those of many."""

    kind: dict[str, Any]
    level: int
    timer: asyncio.TimerHandle
    began: float  # time.monotonic()
    number: int = 0

    def tell(self) -> None:
        if self.number:
            seconds = max(round(time.monotonic() - self.began), 1)
            message = f"... {self.number} more{'' if self.kind else ' of other kinds'} in {seconds} s"
            extra = {"fields": self.kind | {"more": self.number}, "request_id": ""}
            log.log(self.level, message, extra=extra)


class RequestLog:
    """The outermost layer: each request has an id, in its answer and in all lines of the log, and a line at its end.

    Probes that find the engine away have one line, until one finds it well again.
    """

    def __init__(self, app: ASGIApp, lines: RequestLines, keys: Keys | None):
        self.app, self._lines, self._keys = app, lines, keys
        self._failing = set[str]()  # paths whose last probe failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, began = dict(scope["headers"]), time.monotonic()
        given = headers.get(b"x-request-id", b"")
        id = given if _REQUEST_ID.fullmatch(given) else b"req_" + secrets.token_hex(16).encode()
        record = scope["record"] = RequestRecord(id.decode())
        REQUEST_ID.set(record.id)  # not taken back: a request is a task, and what fails further out belongs to it
        names = (b"x-request-id", b"request-id")  # OpenAI's and Anthropic's

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                own = [*message.get("headers", ()), *((name, id) for name in names)]
                message = {**message, "headers": own}
            await send(message)

        try:
            await self.app(scope, receive, named_send)
        except asyncio.CancelledError:  # by the server's end
            if not record.status:
                await stopped().response(scope)(scope, receive, named_send)
        except Exception:
            if record.status:
                record.status = 500
                raise  # the server that runs us logs it, and cuts the connection
            log.exception("the API server failed at a request")
            failed = ApiError(500, "The API server failed at this request; its log says why.", "server_error")
            await failed.response(scope)(scope, receive, named_send)
        finally:
            del scope["record"]  # a kept connection has its last scope, which is not to hold a request's body
            self._write(scope, headers, record, time.monotonic() - began)

    def _write(self, scope: Scope, headers: dict[bytes, bytes], record: RequestRecord, seconds: float) -> None:
        answer = record.answer
        error = record.error or (answer.error if answer else {})
        ended = answer.summary() if answer else {}
        status = error.get("status") or record.status or HUNG_UP
        if status < 400 and "cancelled" in ended.get("finish_reason", ""):
            status = HUNG_UP
        if scope["path"] in OPEN:
            reported = scope["path"] in self._failing
            (self._failing.add if status >= 500 else self._failing.discard)(scope["path"])
            if status < 400 or (status >= 500 and reported):
                return
        fields = {"method": scope["method"], "path": scope["path"][:LONGEST], "status": status}
        key = scope.get("key")
        fields["key"] = self._keys.ordinal(key) if self._keys and key else None
        if status < 400 or status == HUNG_UP:
            fields |= ended
        else:
            fields |= _said(error) | {"user_agent": headers.get(b"user-agent", b"").decode("latin-1")[:LONGEST]}
        fields |= {"ignored": record.ignored[:LONGEST]}
        fields["total_ms"] = round(1000 * seconds, 1)
        self._lines.write(fields, apart=answer is not None and not error)


def _told_as(status: int) -> tuple[int, str]:
    """Return level and message of a status's line."""
    if status < 400:
        return logging.INFO, "request finished"
    if status == HUNG_UP:
        return logging.INFO, "request cancelled"
    return (logging.WARNING, "request refused") if status < 500 else (logging.ERROR, "request failed")


def _said(error: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an error's line: of a refused body the sentence is without the values that it repeats."""
    texts = {name: str(error.get(name) or "")[: 4 * LONGEST] for name in ("field", "error", "reason")}
    if 400 <= (error.get("status") or 0) < 500:
        texts["error"] = _REPEATED.sub("...", texts["error"])
    return {name: text[:LONGEST] for name, text in texts.items()}
