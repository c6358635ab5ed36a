"""Qwen3-Coder's format, which Qwen3.5 and later write too: a tag for the function and one for each argument."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from echo_trt.grammar.requested import listed, resolved
from echo_trt.server.tool_formats.base import ToolRequest, json_rule, parsed, properties_of, written
from echo_trt.server.tool_formats.marked import Marked, MarkedParser

PARAMETER, PARAMETER_END, FUNCTION_END = "<parameter=", "</parameter>", "</function>"
VALUE_END = json.dumps(f"\n{PARAMETER_END}\n")
PYTHONS = {"True": "true", "False": "false", "None": "null"}  # templates write histories with them


class CoderParser(MarkedParser):
    """Strings stand as they are, other values as JSON; which it is, the tool's schema tells."""

    _seen = _given = 0  # characters of ``_text`` without an end in them, arguments of the call

    def _call(self, name: str) -> None:
        self._schema, self._given, self._seen = self._tools[name], 0, 0
        super()._call(name)

    def _inside(self) -> bool:
        self._text = text = self._text.lstrip()
        if text.startswith((FUNCTION_END, self._closes)):
            self._emit_arguments("}" if self._given else "{}")
            self._state = self._after_call
            return True
        if not text.startswith(PARAMETER):
            partial_mark = any(mark.startswith(text) for mark in (PARAMETER, FUNCTION_END, self._closes))
            self._text = text if partial_mark else text[(1 + text[1:].find("<")) or len(text) :]
            return not partial_mark
        end = text.find(PARAMETER_END, max(self._seen - len(PARAMETER_END), 0))
        if end < 0:
            self._seen = len(text)
            return False
        name, _, value = text[len(PARAMETER) : end].partition(">")
        typed = _typed(value.removeprefix("\n").removesuffix("\n"), _part(self._schema, name))
        self._emit_arguments(f"{', ' if self._given else '{'}{written(name)}: {written(typed)}")
        self._text, self._given, self._seen = text[end + len(PARAMETER_END) :], self._given + 1, 0
        return True


def _typed(value: str, part: Mapping[str, Any]) -> Any:
    kinds, plain = _kinds(part), PYTHONS.get(value, value)
    if "string" in kinds and not ("null" in kinds and plain == "null"):
        return value
    try:
        return parsed(plain)
    except (ValueError, RecursionError):
        return value


def _part(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the schema of an argument; empty where there is none."""
    part = properties_of(schema).get(name)
    if isinstance(part, Mapping) and isinstance(reference := part.get("$ref"), str):
        part = resolved(reference, schema)
    return part if isinstance(part, Mapping) else {}


def _kinds(part: Mapping[str, Any]) -> set[str]:
    """Return the types of a part's values; text where it says nothing of them."""
    ways = [part, *listed(part.get("anyOf")), *listed(part.get("oneOf"))]
    named = [each.get("type") for each in ways if isinstance(each, Mapping)]
    kinds = {kind for each in named for kind in (listed(each) or [each]) if isinstance(kind, str)}
    return kinds or {"string" if all(isinstance(each, str) for each in _options(part)) else "number"}


def _options(part: Mapping[str, Any]) -> list[Any]:
    return [part["const"]] if "const" in part else listed(part.get("enum"))


class Coder(Marked):
    """Arguments come in the schema's order."""

    kind = CoderParser

    def function(self, name: str, schema: Mapping[str, Any]) -> str:
        properties, required = schema.get("properties"), listed(schema.get("required"))
        parts = []
        for key in properties if isinstance(properties, Mapping) else ():
            begin = json.dumps(f"{PARAMETER}{key}>\n", ensure_ascii=False)
            value = f"{begin} {_value(_part(schema, key), schema)}"
            parts.append(value if key in required else f"({value})?")
        if schema.get("additionalProperties", properties is None):
            parts.append("parameter*")
        before, after = self.spelt(self.spelling.before.replace("NAME", name)), self.spelt(self.spelling.after)
        return " ".join([before, *parts, after])

    def parts(self, name: str, schema: Mapping[str, Any]) -> tuple[str, ...]:
        opens, (before, after) = [f"{PARAMETER}{key}>\n" for key in properties_of(schema)], self.around(name)
        texts = before, *[f"\n{PARAMETER_END}\n"] * len(opens)
        return tuple(end + begin for end, begin in zip(texts, [*opens, after], strict=True))

    def rules(self, requested: ToolRequest) -> list[str]:
        free = f'parameter: "{PARAMETER}" /[^>\\n]{{1,64}}/ ">\\n" free'
        return [*super().rules(requested), free, f"free[suffix={VALUE_END}]: FREE", r"FREE: /(.|\n)*/"]


def _value(part: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Lark of an argument's value and what closes it."""
    if "string" not in _kinds(part):
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return f"{json_rule({**part, **definitions})} {VALUE_END}"
    texts = [json.dumps(str(each), ensure_ascii=False) for each in _options(part)]
    return f"({' | '.join(texts)}) {VALUE_END}" if texts else "free"
