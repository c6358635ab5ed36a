"""Calls as no template teaches them: an answer that ends in a call's JSON object, bare, in a fence or in a tag."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic_core import from_json

from echo_trt.server.tool_formats.base import Call, Content, FormatReader, ParsedPart, parsed

TAGS = ("tools", "function_call", "response", "json")
WRAPPERS = {"": "", "```": "```", "```json": "```", **{f"<{tag}>": f"</{tag}>" for tag in TAGS}}
SPACE = " \t\r\n"
#: Where a call may begin. Most of code is ruled out here.
BEGIN = re.compile(r'\{[ \t\r\n]*(?:"[nap]|"?\Z)|<(?:[tfrj]|\Z)|`(?:`|\Z)')
NAME, VALUE = ("name",), ("value",)
_NAMED = ('"name"',), (":",), NAME
_GIVEN = ('"arguments"', '"parameters"'), (":",), VALUE
#: Words that a call consists of, any one of each step, with white space anywhere between.
PATHS = [
    ((opens,), ("{",), *first, (",",), *second, ("}",), (closes,))
    for opens, closes in WRAPPERS.items()
    for first, second in ((_NAMED, _GIVEN), (_GIVEN, _NAMED))
]
DECODER = json.JSONDecoder()
SOON = 64  # characters, in which most texts rule out that they are a call


class Written(NamedTuple):
    """A call as far as it has come: whether its object has ended, and the text behind all of it."""

    ended: bool = False
    name: str = ""
    arguments: str = ""
    rest: str = ""


class BareParser(FormatReader):
    """Reads what a format's parser leaves as content.

    Text is held back while it can still become calls up to the answer's end, and is content from the first character
    on that rules it out.
    """

    def __init__(self, marked: FormatReader, tools: Mapping[str, Mapping[str, Any]], several: bool = True):
        super().__init__(tools, several)
        self._marked, self._names = marked, tuple(f'"{name}"' for name in tools)

    def push(self, text: str) -> list[ParsedPart]:
        self._take(self._marked.push(text))
        return self._drain()

    def finish(self, cut: bool = False) -> list[ParsedPart]:
        self._take(self._marked.finish(cut))
        self._end(cut)
        return self._drain()

    def _take(self, parts: list[ParsedPart]) -> None:
        for part in parts:
            if isinstance(part, Content):
                self._text += part.text
                while self._gives_out():
                    pass
            elif isinstance(part, Call):
                self._end(False)
                self._call(part.name)
            else:
                self._emit_arguments(part.text)

    def _gives_out(self) -> bool:
        """Give out what is certainly content; whether there may be more of it."""
        begin = BEGIN.search(self._text)
        start = end = begin.start() if begin else len(self._text)
        for size in (SOON, len(self._text)):  # long texts are seldom ruled out late
            if ruled_out := begin is not None and self._rules_out(self._text[start : start + size]):
                ends = range(start + 1, start + size)
                end = start + bisect_left(ends, True, key=lambda each: self._rules_out(self._text[start:each]))
                break
        certain = len(self._text[:end].rstrip(SPACE))
        self._emit_content(self._text[:certain])
        self._text = self._text[certain:]
        return ruled_out

    def _rules_out(self, text: str) -> bool:
        return self._calls(text) is None

    def _end(self, cut: bool) -> None:
        found = self._calls(self._text) or []
        calls = [call for call in found if call.ended or (cut and call.name)]
        if len(calls) < (1 if cut else len(found)):
            self._emit_content(self._text)
            calls = []
        for call in calls:
            self._call(call.name)
            self._emit_arguments(call.arguments)
        self._text = ""

    def _calls(self, text: str) -> list[Written] | None:
        """Return the calls that a text consists of, as far as they have come; None: it can be none."""
        calls: list[Written] = []
        while text.strip(SPACE) or not calls:
            found = [call for path in PATHS if (call := self._follow(path, text))]
            if not found:
                return None
            calls.append(max(found))
            text = calls[-1].rest
        return calls

    def _follow(self, path: Sequence[tuple[str, ...]], text: str) -> Written | None:
        """Read a text as this path goes, as far as it has come; None: it goes another way."""
        call = Written()
        for step in path:
            text = text.lstrip(SPACE)
            if step is VALUE:
                try:
                    arguments, size = _arguments(text)
                except (ValueError, RecursionError):
                    return None
                call = call._replace(arguments=arguments)
                if not size:
                    return call
            else:
                words = self._names if step is NAME else step
                word = next((each for each in words if text.startswith(each)), None)
                if word is None:
                    return call if any(each.startswith(text) for each in words) else None
                size = len(word)
                if step is NAME:
                    call = call._replace(name=word[1:-1])
            text, call = text[size:], call._replace(ended=call.ended or step == ("}",))
        return call._replace(rest=text)


def _arguments(text: str) -> tuple[str, int]:
    """Return arguments, and the characters that they take: 0 where they go on. Raises ValueError, RecursionError."""
    if text[:1] not in ("", "{", '"'):
        raise ValueError(text)
    try:
        value, size = DECODER.raw_decode(text)
    except ValueError:
        # Raises, too, but for a text that goes on.
        value = from_json(text or "{", allow_partial="trailing-strings", allow_inf_nan=False)
        return value if isinstance(value, str) else text, 0
    from_json(text[:size], allow_inf_nan=False)
    written = value if isinstance(value, str) else text[:size]
    if not isinstance(parsed(written), dict):
        raise ValueError(written)
    return written, size
