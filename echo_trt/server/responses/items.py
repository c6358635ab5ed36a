"""The ``input`` of a response, a text or a list of items, as the turns of a chat."""

from __future__ import annotations

import re
from typing import Any

from echo_trt.server.errors import ApiError, shown
from echo_trt.server.fields import FIELDS, MESSAGES
from echo_trt.server.responses.tools import joined

TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
#: What an item may hold. What is not read says something about the item's first answer, and clients send it back.
READ = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
NOT_READ = frozenset({"type", "id", "status", "phase", "namespace"})  # the last: read in calls
ROLES = ("system", "developer", "user", "assistant")
_PLACE = re.compile(r"^messages\.(\d+)(?:\.tool_calls\.(\d+))?(?:\.function)?")


class Turns:
    """``messages`` of a chat's body. Calls that follow each other, and the text before them, are one turn."""

    def __init__(self, instructions: str | None, given: Any):
        """``given`` is the field ``input``. Raises ApiError."""
        self.messages: list[dict[str, Any]] = []
        self._fields: list[str] = []  # of each message
        self._calls: list[list[str]] = []  # of each message's calls
        if instructions is not None:
            self._add("instructions", {"role": "system", "content": instructions})
        if isinstance(given, str):
            self._add("input", {"role": "user", "content": given})
            return
        if not isinstance(given, list) or not given:
            raise _wrong("input", given, "give a string, or a list of items")
        if len(given) > MESSAGES:
            raise _wrong("input", given, f"give at most {MESSAGES} items")
        for index, item in enumerate(given):
            self._take(f"input.{index}", item)
        if not self.messages:
            raise _wrong("input", given, "give a message at least")

    def field(self, param: str) -> str:
        """Return the client's name of the chat field ``param``."""
        if not (found := _PLACE.match(param)) or int(found[1]) >= len(self._fields):
            return param
        message, rest = int(found[1]), param[found.end() :]
        if found[2] is not None:
            return self._calls[message][int(found[2])] + {".id": ".call_id"}.get(rest, rest)
        return self._fields[message] + (rest if self._fields[message].startswith("input.") else "")

    def _add(self, field: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._fields.append(field)
        self._calls.append([])

    def _take(self, field: str, item: Any) -> None:
        if not isinstance(item, dict) or len(item) > FIELDS:
            raise _wrong(field, item, f"give an object of at most {FIELDS} fields")
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in READ:
            raise _wrong(f"{field}.type", kind, f"this model reads {', '.join(READ)}")
        if kind == "reasoning":
            return
        for name in READ[kind]:
            if item.get(name) is None:
                raise ApiError(400, f"{field}.{name} is missing.", param=f"{field}.{name}")
        for name in item:
            if name not in READ[kind] and name not in NOT_READ and item[name] is not None:
                shown_name = name[:50]
                raise _wrong(f"{field}.{shown_name}", item[name], "nothing of this name is known here; leave it out")
        if kind == "message":
            if item["role"] not in ROLES:
                raise _wrong(f"{field}.role", item["role"], f"give {', '.join(ROLES)}")
            self._add(field, {"role": item["role"], "content": _text(f"{field}.content", item["content"])})
        elif kind == "function_call":
            self._call(field, item)
        else:
            output = _text(f"{field}.output", item["output"])
            self._add(field, {"role": "tool", "tool_call_id": item["call_id"], "content": output})

    def _call(self, field: str, item: dict[str, Any]) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._add(field, {"role": "assistant", "content": None})
        for name in ("namespace", "name"):
            if not isinstance(item.get(name, ""), str | None):
                raise _wrong(f"{field}.{name}", item[name], "give a string")
        function = {"name": joined(item.get("namespace"), item["name"]), "arguments": item["arguments"]}
        calls = self.messages[-1].setdefault("tool_calls", [])
        calls.append({"id": item["call_id"], "type": "function", "function": function})
        self._calls[-1].append(field)


def _text(field: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > MESSAGES:
        raise _wrong(field, content, f"give a string, or at most {MESSAGES} parts")
    return "".join(_part(f"{field}.{index}", part) for index, part in enumerate(content))


def _part(field: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    name = TEXTS.get(kind) if isinstance(kind, str) else None
    text = part.get(name) if name else None
    if not isinstance(text, str):
        raise _wrong(field, part, "give a part of type input_text or output_text; this model reads nothing else")
    return text


def _wrong(field: str, value: Any, reason: str) -> ApiError:
    return ApiError(400, f"{field} is {shown(value)}: {reason}.", param=field)
