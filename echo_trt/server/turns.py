"""The model's text of one choice as the parts of OpenAI's message: thought, content and calls of tools."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterator
from typing import Any

from pydantic_core import from_json

from echo_trt.engine.text.entries import logprob_object, source_object
from echo_trt.engine.text.prompts import ThinkTokens
from echo_trt.engine.text.stream import overlap
from echo_trt.server.answer_types import AssistantMessage, MessageDelta, PartialCall, SourcedToken, WrittenCall
from echo_trt.server.text_client import TextPiece
from echo_trt.server.tool_formats.base import Arguments, Call, Content, FormatReader, ParsedPart


class OutputParser:
    """One choice: takes pieces as they come. The deltas joined are the same however the text is cut.

    content, reasoning, calls  of the text so far
    logprobs, sources          entries of tokens, until ``take_details``
    newest                     the piece that came last, whose counts are of the text so far
    finish_reason              once the last piece has come
    """

    def __init__(self, reasoning: ThinkTokens | None = None, parser: FormatReader | None = None):
        self._reasoning = _ReasoningParser(reasoning) if reasoning else None
        self._closing_token = reasoning.closing_token if reasoning else -1
        self._parser = parser
        self._first, self._closed = True, False
        self.content = self.reasoning = ""
        self.calls: list[WrittenCall] = []
        self.logprobs: list[dict[str, Any]] = []
        self.sources: list[SourcedToken] = []
        self.finish_reason: Any = ""  # a FinishReason
        self.newest, self.reasoning_tokens = TextPiece(), 0

    @property
    def thinks(self) -> bool:
        return self._reasoning is not None

    def take(self, piece: TextPiece) -> list[MessageDelta]:
        """Deltas of OpenAI's for what became certain; all of the rest with the last piece."""
        deltas: list[MessageDelta] = []
        self.newest = piece
        if self._reasoning and self._first:
            self._reasoning.begin(piece.in_thought)
        self._first = False
        parts = self._reasoning.push(piece.text) if self._reasoning else iter([(False, piece.text)])
        for reasoning, text in parts:
            deltas += self._content(reasoning, text)
        if piece.finish_reason:
            for reasoning, text in self._reasoning.finish() if self._reasoning else ():
                deltas += self._content(reasoning, text)
            if self._parser:
                deltas += map(self._delta, self._parser.finish(piece.finish_reason == "length"))
            self.finish_reason = "tool_calls" if self.calls and piece.finish_reason == "stop" else piece.finish_reason
        if self._reasoning:
            self._count(piece)
        self.logprobs += map(logprob_object, piece.logprobs)
        self.sources += map(source_object, piece.sources)
        return deltas

    def take_details(self) -> tuple[list[dict[str, Any]], list[SourcedToken]]:
        """Return the entries of log-probabilities and of sources since the last call."""
        logprobs, sources, self.logprobs, self.sources = self.logprobs, self.sources, [], []
        return logprobs, sources

    @property
    def whole_calls(self) -> list[WrittenCall]:
        """The calls without a last one that a limit has cut, for APIs whose arguments are objects."""
        try:
            from_json(self.calls[-1]["function"]["arguments"] if self.finish_reason == "length" else "0")
        except (ValueError, IndexError):
            return self.calls[:-1]
        return self.calls

    def message(self) -> AssistantMessage:
        """Return OpenAI's message. Content is null where the message has calls or reasoning alone."""
        content = self.content if self.content or not (self.calls or self.reasoning) else None
        message: AssistantMessage = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message["tool_calls"] = self.calls
        if self.reasoning:
            message["reasoning_content"] = message["reasoning"] = self.reasoning
        return message

    def _content(self, reasoning: bool, text: str) -> Iterator[MessageDelta]:
        if reasoning and text:
            self.reasoning += text
            yield {"reasoning_content": text, "reasoning": text}
        elif self._parser:
            yield from map(self._delta, self._parser.push(text))
        elif text:
            yield self._delta(Content(text))

    def _delta(self, event: ParsedPart) -> MessageDelta:
        if isinstance(event, Content):
            self.content += event.text
            return {"content": event.text}
        if isinstance(event, Call):
            id = "call_" + "".join(secrets.choice(string.ascii_letters) for _ in range(24))
            self.calls.append({"id": id, "type": "function", "function": {"name": event.name, "arguments": ""}})
            call: PartialCall = {"id": id, "type": "function", "function": {"name": event.name, "arguments": ""}}
        else:
            assert isinstance(event, Arguments)
            self.calls[-1]["function"]["arguments"] += event.text
            call = {"function": {"arguments": event.text}}
        return {"tool_calls": [{"index": len(self.calls) - 1, **call}]}

    def _count(self, piece: TextPiece) -> None:
        """Count the tokens up to the mark that closes the thought, in so far as there was one."""
        assert self._reasoning
        if not self._closed:
            self._closed = self._closing_token in piece.token_ids
            last = piece.token_ids.index(self._closing_token) + 1 if self._closed else len(piece.token_ids)
            self.reasoning_tokens += last
        if piece.finish_reason and not self._reasoning.reasoning:
            self.reasoning_tokens = 0


class _ReasoningParser:
    """Splits a text at the marks of reasoning, and drops white space next to the marks."""

    def __init__(self, marks: ThinkTokens):
        self._opens, self._closes = marks.opens, marks.closes
        self._text = ""
        self._state: Callable[[], tuple[bool, str] | None] = self._before
        self.reasoning = False  # whether there was a thought

    def begin(self, inside: bool) -> None:
        """``inside``: the prompt has opened the thought."""
        if inside:
            self._state, self.reasoning = self._opening, True

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield (whether the text is reasoning, text)."""
        self._text += text
        while True:
            state = self._state
            if part := state():
                yield part
            if self._state == state:
                return

    def finish(self) -> Iterator[tuple[bool, str]]:
        inside = self._state in (self._opening, self._opened, self._inside)
        if self._text and self._state != self._behind:
            yield inside, self._text.rstrip() if inside else self._text
        self._text = ""

    def _before(self) -> None:
        rest = self._text.lstrip()
        if rest.startswith(self._opens):
            self._text, self._state, self.reasoning = rest[len(self._opens) :], self._opened, True
        elif rest and overlap(rest, self._opens) < len(rest):
            self._state = self._content

    def _opening(self) -> None:
        self._text = self._text.lstrip()
        if self._text.startswith(self._opens):  # the prompt had opened it already
            self._text, self._state = self._text[len(self._opens) :], self._opened
        elif self._text and not self._opens.startswith(self._text):
            self._state = self._inside

    def _opened(self) -> None:
        """Skip white space. A second mark is the thought's text."""
        self._text = self._text.lstrip()
        if self._text:
            self._state = self._inside

    def _inside(self) -> tuple[bool, str] | None:
        offset = self._text.find(self._closes)
        end = offset if offset >= 0 else len(self._text) - overlap(self._text, self._closes)
        certain = self._text[:end].rstrip()
        if offset >= 0:
            self._text, self._state = self._text[offset + len(self._closes) :], self._behind
        else:
            self._text = self._text[len(certain) :]
        return (True, certain) if certain else None

    def _behind(self) -> None:
        self._text = self._text.lstrip()
        if self._text:
            self._state = self._content

    def _content(self) -> tuple[bool, str] | None:
        text, self._text = self._text, ""
        return (False, text) if text else None
