"""``system`` and ``messages`` of Anthropic's API, made of blocks, as the turns of a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from echo_trt.server.errors import ApiError, shown, wrong
from echo_trt.server.fields import FIELDS, MESSAGES, read_at
from echo_trt.server.translated import TurnList

#: What a block must hold. What is not read, such as cache_control, changes no text.
READ: dict[str, dict[str, type]] = {
    "text": {"text": str},
    "thinking": {"thinking": str},
    "redacted_thinking": {},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
}
#: Types of blocks by role.
BLOCKS = {"system": ("text",), "user": ("text", "tool_result")}
BLOCKS["assistant"] = ("text", "thinking", "redacted_thinking", "tool_use")


class BlockTurns(TurnList):
    """The turns of ``system`` and ``messages``."""

    def __init__(self, system: Any, given: Any):
        """``given`` is the field ``messages``. Raises ApiError."""
        super().__init__()
        if system:
            self._take("system", "system", system)
        if not isinstance(given, list) or not 0 < len(given) <= MESSAGES:
            raise wrong("messages", given, f"give 1 to {MESSAGES} messages")
        for index, message in enumerate(given):
            role = message.get("role") if isinstance(message, dict) else None
            if not isinstance(role, str) or role not in BLOCKS or "content" not in message or len(message) > FIELDS:
                raise wrong(f"messages.{index}", message, "give an object of a role, user or assistant, and content")
            read_at(f"messages.{index}", message, ("role", "content"), "messages.")
            if message["content"] == []:
                raise wrong(f"messages.{index}.content", [], "give a string, or blocks")
            self._take(f"messages.{index}", role, message["content"])
        if self.messages[-1]["role"] == "assistant":
            param = f"messages.{len(given) - 1}.role"
            raise wrong(param, "assistant", "a text that has begun is not continued here; end with a user's message")

    def _take(self, field: str, role: str, content: Any) -> None:
        texts: list[str] = []
        if role == "assistant":
            self.add(field, role, None)
        for where, block in _blocks(field if role == "system" else f"{field}.content", content, BLOCKS[role]):
            if block["type"] == "text":
                texts.append(block["text"])
            elif block["type"] == "thinking":
                turn = self.messages[-1]
                turn["reasoning_content"] = turn.get("reasoning_content", "") + block["thinking"]
            elif block["type"] == "tool_use":
                self.call(where, block["id"], block["name"], json.dumps(block["input"], ensure_ascii=False))
            elif block["type"] == "tool_result":
                found = [each["text"] for _, each in _blocks(f"{where}.content", block.get("content", ""), ("text",))]
                self.add(where, "tool", "\n".join(found), tool_call_id=block["tool_use_id"])
        if role == "assistant":
            self.messages[-1]["content"] = "".join(texts) or (None if "tool_calls" in self.messages[-1] else "")
        elif texts:
            self.add(field, role, "\n".join(texts))


def _blocks(field: str, content: Any, kinds: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield blocks and the field of each. Raises ApiError where they are not of these types."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or len(content) > MESSAGES:
        raise wrong(field, content, f"give a string, or at most {MESSAGES} blocks")
    for index, block in enumerate(content):
        where = f"{field}.{index}"
        kind = block.get("type") if isinstance(block, dict) and len(block) <= FIELDS else None
        if not isinstance(kind, str) or kind not in kinds:
            found = f"of type {shown(kind)}" if isinstance(kind, str) else shown(block)
            message = f"{where} is {found}, and this model reads {' and '.join(kinds)} alone; leave it out."
            raise ApiError(400, message, param=where)
        for name, value_type in READ[kind].items():
            if not isinstance(block.get(name), value_type):
                raise wrong(
                    f"{where}.{name}", block.get(name), f"give {'a string' if value_type is str else 'an object'}"
                )
        yield where, block
