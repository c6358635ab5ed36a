"""The format of Llama 3.1 and later: an answer that is nothing but JSON objects with a name and parameters."""

from __future__ import annotations

import re
from collections.abc import Collection

from echo_trt.engine.text import overlap
from echo_trt.server.tool_formats.base import Format, Parser, Scan, ToolRequest

TAG = "<|python_tag|>"  # may come first; a special token, so it is seldom in the text
SPACE = " \t\r\n"
KEYS = ('"name"', '"parameters"', '"arguments"', '"type"')  # with which a call's object may begin


class Llama3Parser(Parser):
    """Calls stand before all content.

    marks      may come before the first call, in this order
    separates  characters that stand around calls beside white space; ``closes`` are no content behind the last one
    """

    marks: tuple[str, ...] = (TAG,)
    separates, closes = ";", ""
    _before = ""  # what separates the object that is being read from the one before
    _seen = 0  # characters of ``_text`` that were scanned for its end

    def _begin(self) -> bool:
        """Decide whether an object follows or content."""
        rest = self._text.lstrip(SPACE + (self.separates if self.calls else ""))
        if not rest or any(overlap(rest, mark) == len(rest) for mark in self.marks):
            return False
        self._before += self._text[: len(self._text) - len(rest)]
        self._text, self._scan, self._seen = rest, Scan(), 0
        for index, mark in enumerate(self.marks):
            if rest.startswith(mark):
                self._text, self._before = rest[len(mark) :], self._before + mark
                self.marks = self.marks[index + 1 :]
                return True
        self._state = self._object if rest[0] == "{" else self._content
        return True

    def _object(self) -> bool:
        if self._head():
            self._before, self.marks, self._state = "", (), self._inside
            return True
        first = self._text[1:].lstrip()
        if not any(first.startswith(key) or key.startswith(first) for key in KEYS):
            self._state = self._content
            return True
        self._seen += self._scan.end(self._text[self._seen :])
        if not self._scan.over:
            return False
        if self._whole(self._text[: self._seen]):
            self._text, self._before, self.marks, self._state = self._text[self._seen :], "", (), self._begin
        else:
            self._state = self._content
        return True

    def _behind(self) -> bool:
        _, closed, rest = self._text.partition("}")
        self._text = rest
        if closed:
            self._state = self._begin
        return bool(closed)

    def _content(self) -> bool:
        self._say(self._before.lstrip(self.closes) + self._text)
        self._text = self._before = ""
        return False

    def _end(self) -> None:
        if self._state in (self._begin, self._object):
            rest = self._before + self._text
            if rest.strip(SPACE + self.separates) or not self.calls:
                self._say(rest)
        self._text = ""


class Llama3(Format):
    """{"name": ..., "parameters": ...}."""

    key, parser = "parameters", Llama3Parser

    @classmethod
    def of(cls, template: str, tokens: Collection[str]) -> Llama3 | None:
        """Llama 3.1's template refuses a history with several calls in a turn, so its answers have one."""
        if '"parameters": ' not in template or not (TAG in template or "<|start_header_id|>" in template):
            return None
        return cls(tokens, several=re.search(r"single tool.calls?", template) is None)

    def rules(self, requested: ToolRequest) -> list[str]:
        calls = 'calls: function ("; " function)*' if requested.several else "calls: function"
        if requested.must:
            return ["start: calls", calls]
        if requested.content is not None:
            return ["start: calls | content", f"content: {requested.content}", calls]
        return ["start: calls | text", "text: TEXT", r"TEXT: /([ \t\r\n]*[^{ \t\r\n](.|\n)*)?/", calls]
