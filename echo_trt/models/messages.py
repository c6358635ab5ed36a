"""Conversations and tools as a chat encoder takes them: checked, in the form that Hugging Face's templates expect."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from echo_trt.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

MAX_TOOLS = 128  # of a request: more fill the prompt, and a grammar of them takes long to compile
#: What a template may read of a message beside its role and content.
TEXTS = ("name", "tool_call_id", "reasoning_content")
TOOL_RULE = 'give a list such as [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}].'


def checked_messages(messages: object, name: str, rule: str) -> list[dict[str, Any]]:
    """Check a conversation and drop the keys that no template reads.

    Content may be null beside ``tool_calls``; arguments become objects. A refusal names ``name``, and ends by ``rule``.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{name} is no list of messages; {rule}")
    return [_message(message, f"{name}[{index}]", rule) for index, message in enumerate(messages)]


def _message(message: object, where: str, rule: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where} has no role and content, both strings; {rule}")
    calls, content = message.get("tool_calls"), message.get("content")
    if content is None and calls:
        content = ""
    if not _is_text(message.get("role")) or not _is_text(content):
        raise UserError(f"{where} has no role and content, both strings; {rule}")
    kept: dict[str, Any] = {"role": message["role"], "content": content}
    for key in TEXTS:
        if message.get(key) is not None:
            if not _is_text(message[key]):
                raise UserError(f"{where}.{key} is no text; give a string.")
            kept[key] = message[key]
    if calls:
        if not isinstance(calls, list | tuple):
            raise UserError(f"{where}.tool_calls is no list; give the calls of an earlier answer.")
        kept["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return kept


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not _is_text(function.get("name")):
        raise UserError(f"{where} has no function with a name; give the calls of an earlier answer.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict) or not all(map(_is_text, strings_in(arguments))):
        raise UserError(f"{where}.function.arguments is no JSON object; give one, such as {{}}.")
    named = {"id": call["id"]} if _is_text(call.get("id")) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def with_short_ids(messages: Messages) -> list[dict[str, Any]]:
    """Return a conversation whose calls have ids of nine letters and digits, which Mistral's templates insist on."""
    short = [dict(message) for message in messages]
    for message in short:
        if "tool_calls" in message:
            message["tool_calls"] = [{**call, "id": _short(call.get("id", ""))} for call in message["tool_calls"]]
        if "tool_call_id" in message:
            message["tool_call_id"] = _short(message["tool_call_id"])
    return short


def _short(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9]{9}", name) else hashlib.sha256(name.encode()).hexdigest()[:9]


def checked_tools(tools: object, name: str = "tools") -> list[dict[str, Any]]:
    """Tools as OpenAI's API has them: functions with a name each of their own. A refusal names ``name``."""
    if not isinstance(tools, list | tuple) or not tools:
        raise UserError(f"{name} is no list of tools; {TOOL_RULE}")
    if len(tools) > MAX_TOOLS:
        raise UserError(f"{name} has {len(tools)} entries; give at most {MAX_TOOLS}.")
    known: set[str] = set()
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not _is_text(function.get("name")):
            raise UserError(f"{name}[{index}] has no function with a name; {TOOL_RULE}")
        if not all(map(_is_text, strings_in(tool))):
            raise UserError(f"{name}[{index}] holds half a surrogate pair; send text that UTF-8 can write.")
        if function["name"] in known:
            raise UserError(f"{name}[{index}] is a second function {function['name']!r}; give each its own name.")
        known.add(function["name"])
    return [dict(tool) for tool in tools]


def strings_in(value: object) -> Iterator[str]:
    """All strings of a JSON value, keys included, however deep it is."""
    open_values = [value]
    while open_values:
        each = open_values.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            open_values += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            open_values += each


def _is_text(value: object) -> bool:
    """Whether it is a string, and one that UTF-8 can write: JSON may hold half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)
