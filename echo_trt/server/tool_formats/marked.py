"""Calls between marks: Hermes' format, which Qwen2.5 and Qwen3 write too, DeepSeek's and Mistral's."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from echo_trt.engine.text.stream import overlap
from echo_trt.models.tools_as_text import CLOSE, OPEN
from echo_trt.server.tool_formats.base import HEAD, NAME, Format, Parser, ToolRequest, call_schema, json_rule

#: DeepSeek's, whose lines and spaces are no ASCII.
CALLS, CALLS_END, CALL, CALL_END, SEPARATOR = (
    f"<\uff5c{words}\uff5c>".replace(" ", "\u2581")
    for words in ("tool calls begin", "tool calls end", "tool call begin", "tool call end", "tool sep")
)


@dataclass(frozen=True)
class Spelling:
    """How a format writes calls. Where NAME is not in ``before``, a call is an object that holds its name.

    taught   what its chat templates hold
    opens    marks before a call: before the first, and before others where theirs is another
    before   before the arguments of a call, or before its object
    after    behind them
    between  between two calls
    ends     behind the last call
    """

    taught: tuple[str, ...]
    opens: tuple[str, ...]
    before: str
    after: str
    between: str
    ends: str = ""

    @property
    def closes(self) -> str:
        """The mark behind a call; white space and Markdown before it may be missing."""
        return self.after[self.after.rfind("<") :] if self.after else ""

    @property
    def head(self) -> re.Pattern[str]:
        """A call up to its arguments."""
        if "NAME" not in self.before:
            return HEAD
        first = re.escape(self.opens[-1])
        pattern = re.escape(self.before.removeprefix(self.opens[-1]).strip()).replace("\\\n", r"\s{0,8}")
        named = pattern.replace("NAME", rf"({NAME})(?:\[CALL_ID\]\w{{1,64}})?", 1)
        follows = r"\s{0,8}(?={)" if self.before[-2:] != ">\n" else ""  # arguments are JSON, or in tags
        return re.compile(rf"\s{{0,8}}(?:{first})?\s{{0,8}}{named}{follows}")


HERMES = Spelling((OPEN,), (OPEN,), "\n", f"\n{CLOSE}", f"\n{OPEN}")
CODER = Spelling((OPEN, "<function="), (OPEN,), "\n<function=NAME>\n", f"</function>\n{CLOSE}", f"\n{OPEN}")
JSON = "```json"  # in calls of DeepSeek's V3 and R1
#: A template is of the first that it holds all marks of.
SPELLINGS = (
    CODER,
    HERMES,
    Spelling(
        (CALLS, JSON), (CALLS, CALL), f"{CALL}function{SEPARATOR}NAME\n{JSON}\n", f"\n```{CALL_END}", "\n", CALLS_END
    ),
    Spelling((CALLS,), (CALLS, CALL), f"{CALL}NAME{SEPARATOR}", CALL_END, "", CALLS_END),  # DeepSeek V3.1's
    Spelling(("[TOOL_CALLS]", "[ARGS]"), ("[TOOL_CALLS]",), "NAME[ARGS]", "", "[TOOL_CALLS]"),  # Mistral's
)


class MarkedParser(Parser):
    """Calls may stand anywhere in the text; white space around them is no content."""

    _before = _open = ""  # white space before the call that is being read, and its mark

    def __init__(self, *args: Any, spelling: Spelling = HERMES, **more: Any):
        super().__init__(*args, **more)
        self._spelling, self._closes, self._head_pattern = spelling, spelling.closes, spelling.head
        self._marks = (*spelling.opens, *filter(None, [spelling.ends]))

    def _begin(self) -> bool:
        found = [(offset, mark) for mark in self._marks if (offset := self._text.find(mark)) >= 0]
        offset, self._open = min(found, default=(len(self._text), ""))
        held = 0 if found else max(overlap(self._text, mark) for mark in self._marks)
        certain = self._text[: offset - held].rstrip()
        self._emit_content(certain)
        if not found:
            self._text = self._text[len(certain) :]
            return False
        self._before, self._text = self._text[len(certain) : offset], self._text[offset + len(self._open) :]
        if self._open != self._spelling.ends:
            self._state = self._object
        return True

    def _object(self) -> bool:
        if self._head():
            self._state = self._inside
            return True
        end = self._text.find(self._closes or self._marks[0])
        if end < 0:
            return False
        if not self._whole(self._text[:end]):
            self._emit_content(self._before + self._open + self._text[:end] + self._closes)
        self._text = self._text[end + len(self._closes) :]
        self._state = self._begin
        return True

    def _whole(self, text: str) -> bool:
        return self._head_pattern is HEAD and super()._whole(text)

    def _after_call(self) -> bool:
        end = self._text.find(self._closes)
        if end < 0:
            self._text = self._text[len(self._text) - overlap(self._text, self._closes) :]
            return False
        self._text = self._text[end + len(self._closes) :]
        self._state = self._begin
        return True

    def _end(self, cut: bool) -> None:
        if self._state == self._begin:
            if cut and (held := max(overlap(self._text, mark) for mark in self._marks)) > 1:  # one may be anything
                self._text = self._text[:-held].rstrip()
            if self._text.strip() or not self.calls:
                self._emit_content(self._text)
        elif self._state == self._object and not self._whole(self._text):  # the closing mark need not come
            if not cut:
                self._emit_content(self._before + self._open + self._text)
            else:
                self._begun()
        self._text = ""


class Marked(Format):
    """The formats of SPELLINGS."""

    kind: type[MarkedParser] = MarkedParser
    key = "arguments"

    def __init__(self, spelling: Spelling, tokens: Collection[str] = ()):
        super().__init__(tokens)
        self.spelling, self.parser = spelling, partial(self.kind, spelling=spelling)

    def spelt(self, text: str) -> str:
        """Lark of a text with marks."""
        marks = "|".join(re.escape(token) for token in self.tokens if token[0] == "<")
        return " ".join(self.mark(part) for part in (re.split(f"({marks})", text) if marks else [text]) if part)

    def function(self, name: str, schema: Mapping[str, Any]) -> str:
        before, after = self.spelt(self.spelling.before.replace("NAME", name)), self.spelt(self.spelling.after)
        named = "NAME" in self.spelling.before
        return f"{before} {json_rule(schema if named else call_schema(name, 'arguments', schema))} {after}"

    def around(self, name: str) -> tuple[str, str]:
        begin, after = self.spelling.opens[0] + self.spelling.before.replace("NAME", name), self.spelling.after
        before, end = ("", "") if "NAME" in self.spelling.before else super().around(name)
        return begin + before, end + after

    def rules(self, requested: ToolRequest) -> list[str]:
        spelling = self.spelling
        first, between, ends = map(self.spelt, (spelling.opens[0], spelling.between, spelling.ends))
        several = f"({between} function)*" if requested.several else ""
        calls, rest = f"calls: {first} rest", f"rest: function {several} {ends}"
        lead = r"LEAD: /[ \n]{0,4}/"
        if requested.call_required:
            return ["start: LEAD calls", lead, calls, rest]
        if requested.content is not None:
            return ["start: LEAD calls | LEAD content", f"content: {requested.content}", lead, calls, rest]
        start = "start: (opened rest)* text" if requested.several else "start: text | opened rest"
        suffix = f"spelt[suffix={json.dumps(spelling.opens[0], ensure_ascii=False)}]: TEXT"
        opened = f"opened: spelt | text {first}" if first == spelling.opens[0] else "opened: spelt"
        return [start, opened, suffix, "text: TEXT", r"TEXT: /(.|\n)*/", rest]
