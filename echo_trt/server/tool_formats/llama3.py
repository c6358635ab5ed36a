"""Answers that are nothing but JSON objects with a name: of Llama 3.1 and later, and in a list of older Mistral's."""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from echo_trt.engine.text.stream import overlap
from echo_trt.server.tool_formats.base import Format, Parser, Scan, ToolRequest

TAG = "<|python_tag|>"  # may come first; a special token, so it is seldom in the text
MISTRALS = "[TOOL_CALLS]"
KEYS = ('"name"', '"parameters"', '"arguments"', '"type"')  # with which a call's object may begin


class Llama3Parser(Parser):
    """Calls stand before all content, apart by white space and semicolons."""

    tag, apart = TAG, " \t\r\n;"
    _before = ""  # what separates the object that is being read from the one before
    _seen = 0  # characters of ``_text`` that were scanned for its end

    def _begin(self) -> bool:
        return self._look(self.tag)

    def _between(self) -> bool:
        return self._look("")

    def _look(self, mark: str) -> bool:
        """Decide whether an object follows or content; ``mark`` may precede an object."""
        rest = self._text.lstrip(" \t\r\n" if mark else self.apart)
        if mark and rest.startswith(mark):
            self._text, self._before = rest[len(mark) :], self._before + self._text[: len(self._text) - len(rest)]
            self._before += mark
            self._state = self._between
            return True
        if not rest or (mark and overlap(rest, mark) == len(rest)):
            return False
        self._before += self._text[: len(self._text) - len(rest)]
        self._text, self._scan, self._seen = rest, Scan(), 0
        self._state = self._object if rest[0] == "{" else self._content
        return True

    def _object(self) -> bool:
        if self._head():
            self._before, self._state = "", self._inside
            return True
        first = self._text[1:].lstrip()
        if not any(first.startswith(key) or key.startswith(first) for key in KEYS):
            self._state = self._content
            return True
        self._seen += self._scan.end(self._text[self._seen :])
        if not self._scan.over:
            return False
        if self._whole(self._text[: self._seen]):
            self._text, self._before, self._state = self._text[self._seen :], "", self._between
        else:
            self._state = self._content
        return True

    def _after_call(self) -> bool:
        _, closed, rest = self._text.partition("}")
        self._text = rest
        if closed:
            self._state = self._between
        return bool(closed)

    def _content(self) -> bool:
        self._emit_content(self._before + self._text)
        self._text = self._before = ""
        return False

    def _end(self, cut: bool) -> None:
        if self._state in (self._begin, self._between, self._object):
            rest = self._before + self._text
            is_markup = self.calls or self.tag in rest or overlap(rest, self.tag) > 1
            if cut and (self._begun() or is_markup):
                rest = ""
            if rest.strip(self.apart) or not self.calls:
                self._emit_content(rest)
        self._text = ""


class Llama3(Format):
    """{"name": ..., "parameters": ...}."""

    key, parser = "parameters", Llama3Parser
    around_calls = ("", "; ", "")  # before the calls, between them, behind them

    @classmethod
    def of(cls, template: str, tokens: Collection[str]) -> Llama3 | None:
        """Llama 3.1's template refuses a history with several calls in a turn, so its answers have one."""
        if '"parameters": ' not in template or not (TAG in template or "<|start_header_id|>" in template):
            return None
        return cls(tokens, several=re.search(r"single tool.calls?", template) is None)

    def around(self, name: str) -> tuple[str, str]:
        before, after = super().around(name)
        return self.around_calls[0] + before, after + self.around_calls[2]

    def rules(self, requested: ToolRequest) -> list[str]:
        before, between, after = map(json.dumps, self.around_calls)
        several = f"({between} function)*" if requested.several else ""
        calls = f"calls: {before} function {several} {after}"
        if requested.call_required:
            return ["start: calls", calls]
        if requested.content is not None:
            return ["start: calls | content", f"content: {requested.content}", calls]
        first = re.escape((self.around_calls[0] or "{")[0])  # text that begins like a call is none
        return ["start: calls | text", "text: TEXT", rf"TEXT: /([ \t\r\n]*[^{first} \t\r\n](.|\n)*)?/", calls]


class MistralListParser(Llama3Parser):
    """Calls are a list behind a mark."""

    tag, apart = MISTRALS, " \t\r\n,[]"


class MistralList(Llama3):
    """[{"name": ..., "arguments": ...}], of Mistral's models up to the summer of 2025."""

    key, parser = "arguments", MistralListParser

    @classmethod
    def of(cls, template: str, tokens: Collection[str]) -> MistralList | None:
        """Newer templates write [ARGS] behind a name."""
        if MISTRALS not in template or "[ARGS]" in template:
            return None
        form = cls(tokens)
        form.around_calls = (MISTRALS + (" [" if f"{MISTRALS} [" in template else "["), ", ", "]")
        return form
