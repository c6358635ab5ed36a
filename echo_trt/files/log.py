"""The log's one form for all processes: a line has time, level, process, message and fields, as text or as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from echo_trt.errors import UserError, described

FORMATS = ("text", "json")
OWN = '{"time": '  # how lines in JSON begin
Line = dict[str, Any]  # time, level, process and message, then fields; of an error also its traceback
#: Id of the HTTP request that is being answered; lines that are logged meanwhile have it.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_BARE = re.compile(r"[\w./:,;@+*-]+", re.ASCII)  # values that stand in text without quotation marks


def line(level: str, process: str, message: str, seconds: float | None = None, **fields: Any) -> Line:
    """Return a line; fields that are None or "" are left out. ``seconds``: since the epoch, by default now."""
    when = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    written = when.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
    return {"time": written, "level": level, "process": process, "message": message, **known}


def written(line: Line, form: str) -> str:
    """Write a line as JSON, or as text: a line, and below it one with the same beginning per line of a traceback.

    Nothing in a message or a field can begin a line: what cannot be printed is escaped.
    """
    if form == "json":
        return json.dumps(line)
    fields = dict(line)
    when, level, process, message = (fields.pop(name, "") for name in ("time", "level", "process", "message"))
    trace = str(fields.pop("traceback", "")).splitlines()
    words = [str(message), *(f"{name}={_value(value)}" for name, value in fields.items())]
    return "\n".join(_printable(f"{when} {level} {process}: {text}") for text in (" ".join(words), *trace))


def read(text: str, process: str) -> Line:
    """Read a line of a child process: one of this form in JSON, or any text, whose level is guessed."""
    if text.startswith(OWN):
        with suppress(ValueError):  # cut, or mixed with another one
            found: Line = json.loads(text)
            return dict.fromkeys(found) | {"level": "INFO", "process": process, "message": ""} | found
    wrong = text.startswith("error: ")
    return line("ERROR" if wrong else "INFO", process, text.removeprefix("error: ") if wrong else text)


def configure(process: str, form: str = "text") -> None:
    """Write this process's log to standard error in the form, with what warns and what ends a thread."""
    if form not in FORMATS:
        raise UserError(f"the log's format is {form!r}; give {' or '.join(FORMATS)}.")
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(process, form))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _ended
    threading.excepthook = lambda given: _ended(given.exc_type, given.exc_value, given.exc_traceback)


class LineFormatter(logging.Formatter):
    """Formats records of ``logging``: ``extra`` may have a request_id, and ``fields``, a dict."""

    def __init__(self, process: str, form: str):
        super().__init__()
        self._process, self._form = process, form

    def format(self, record: logging.LogRecord) -> str:
        id = getattr(record, "request_id", None)
        fields = {"request_id": REQUEST_ID.get() if id is None else id, **getattr(record, "fields", {})}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        made = line(record.levelname, self._process, record.getMessage().strip(), record.created, **fields)
        return written(made, self._form)


def tell_mistake(error: Exception) -> None:
    """Tell what ends this process as a line of its log; as a sentence where it has none yet."""
    if any(isinstance(handler.formatter, LineFormatter) for handler in logging.getLogger().handlers):
        logging.getLogger().error("%s", error)
    else:
        print(f"error: {error}", file=sys.stderr)


def _ended(kind: Any, error: Any, trace: Any) -> None:
    logging.getLogger().critical("ended by %s", described(error), exc_info=(kind, error, trace))


def _value(value: Any) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
