"""The ``input`` of a response, a text or a list of items, as the turns of a chat."""

from __future__ import annotations

import re
from typing import Any

from echo_trt.server.errors import ApiError, wrong
from echo_trt.server.fields import FIELDS, MESSAGES, read_at
from echo_trt.server.responses.tools import joined
from echo_trt.server.translated import TurnList

TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
#: What an item must hold.
READ = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
ROLES = ("system", "developer", "user", "assistant")


class Turns(TurnList):
    """The turns of ``instructions`` and ``input``."""

    def __init__(self, instructions: str | None, given: Any):
        """``given`` is the field ``input``. Raises ApiError."""
        super().__init__()
        if instructions is not None:
            self.add("instructions", "system", instructions)
        if isinstance(given, str):
            self.add("input", "user", given)
            return
        if not isinstance(given, list) or not given:
            raise wrong("input", given, "give a string, or a list of items")
        if len(given) > MESSAGES:
            raise wrong("input", given, f"give at most {MESSAGES} items")
        for index, item in enumerate(given):
            self._take(f"input.{index}", item)
        if not self.messages:
            raise wrong("input", given, "give a message at least")

    def field(self, param: str) -> str:
        field = super().field(param)
        return re.sub(r"\.id$", ".call_id", field) if ".tool_calls." in param else field

    def _take(self, field: str, item: Any) -> None:
        if not isinstance(item, dict) or len(item) > FIELDS:
            raise wrong(field, item, f"give an object of at most {FIELDS} fields")
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in READ:
            raise wrong(f"{field}.type", kind, f"this model reads {', '.join(READ)}")
        if kind == "reasoning":
            return
        for name in READ[kind]:
            if item.get(name) is None:
                raise ApiError(400, f"{field}.{name} is missing.", param=f"{field}.{name}")
        read_at(field, item, (*READ[kind], "type", "id", "namespace"), "input.")
        if kind == "message":
            if item["role"] not in ROLES:
                raise wrong(f"{field}.role", item["role"], f"give {', '.join(ROLES)}")
            self.add(field, item["role"], _text(f"{field}.content", item["content"]))
        elif kind == "function_call":
            self._call(field, item)
        else:
            output = _text(f"{field}.output", item["output"])
            self.add(field, "tool", output, tool_call_id=item["call_id"])

    def _call(self, field: str, item: dict[str, Any]) -> None:
        for name in ("namespace", "name"):
            if not isinstance(item.get(name, ""), str | None):
                raise wrong(f"{field}.{name}", item[name], "give a string")
        self.call(field, item["call_id"], joined(item.get("namespace"), item["name"]), item["arguments"])


def _text(field: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > MESSAGES:
        raise wrong(field, content, f"give a string, or at most {MESSAGES} parts")
    return "".join(_part(f"{field}.{index}", part) for index, part in enumerate(content))


def _part(field: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    name = TEXTS.get(kind) if isinstance(kind, str) else None
    text = part.get(name) if name else None
    if not isinstance(text, str):
        raise wrong(field, part, "give a part of type input_text or output_text; this model reads nothing else")
    return text
