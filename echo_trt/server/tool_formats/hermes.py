"""Hermes' format, which Qwen2.5 and Qwen3 write too: JSON between <tool_call> and </tool_call>."""

from __future__ import annotations

from collections.abc import Collection

from echo_trt.engine.text import overlap
from echo_trt.models.tools_as_text import CLOSE, OPEN
from echo_trt.server.tool_formats.base import Format, Parser, ToolRequest


class HermesParser(Parser):
    """Calls may stand anywhere in the text; white space around them is no content."""

    _before = ""  # white space before the call that is being read

    def _begin(self) -> bool:
        offset = self._text.find(OPEN)
        certain = self._text[: offset if offset >= 0 else len(self._text) - overlap(self._text, OPEN)].rstrip()
        self._say(certain)
        if offset < 0:
            self._text = self._text[len(certain) :]
            return False
        self._before, self._text = self._text[len(certain) : offset], self._text[offset + len(OPEN) :]
        self._state = self._object
        return True

    def _object(self) -> bool:
        if self._head():
            self._state = self._inside
            return True
        end = self._text.find(CLOSE)
        if end < 0:
            return False
        if not self._whole(self._text[:end]):
            self._say(self._before + OPEN + self._text[:end] + CLOSE)
        self._text = self._text[end + len(CLOSE) :]
        self._state = self._begin
        return True

    def _behind(self) -> bool:
        end = self._text.find(CLOSE)
        if end < 0:
            self._text = self._text[len(self._text) - overlap(self._text, CLOSE) :]
            return False
        self._text = self._text[end + len(CLOSE) :]
        self._state = self._begin
        return True

    def _end(self) -> None:
        if self._state == self._begin and (self._text.strip() or not self.calls):
            self._say(self._text)
        elif self._state == self._object and not self._whole(self._text):  # the closing mark need not come
            self._say(self._before + OPEN + self._text)
        self._text = ""


class Hermes(Format):
    """{"name": ..., "arguments": ...}, on a line of its own between the marks."""

    key, parser = "arguments", HermesParser

    @classmethod
    def of(cls, template: str, tokens: Collection[str]) -> Hermes | None:
        """Qwen3-Coder's templates have the marks too, and XML between them."""
        return cls(tokens) if OPEN in template and "<function=" not in template else None

    def rules(self, requested: ToolRequest) -> list[str]:
        call = f"call: {self.mark(OPEN)} rest"
        rest = f'rest: "\\n" function "\\n" {self.mark(CLOSE)}'
        calls = 'calls: call ("\\n" call)*' if requested.several else "calls: call"
        lead = r"LEAD: /[ \n]{0,4}/"
        if requested.must:
            return ["start: LEAD calls", lead, calls, call, rest]
        if requested.content is not None:
            return ["start: LEAD calls | LEAD content", f"content: {requested.content}", lead, calls, call, rest]
        start = "start: (opened rest)* text" if requested.several else "start: text | opened rest"
        spelt = f'spelt[suffix="{OPEN}"]: TEXT'
        opened = f"opened: spelt | text {OPEN}" if OPEN in self.tokens else "opened: spelt"
        return [start, opened, spelt, "text: TEXT", r"TEXT: /(.|\n)*/", rest]
