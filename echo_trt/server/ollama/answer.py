"""One answer in the shape of Ollama's API: an object, or a line of JSON per piece."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from echo_trt.server.answers import Answer, AnswerEvent
from echo_trt.server.errors import ApiError
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.ollama.request import GenerateRequest, OllamaRequest
from echo_trt.server.ollama.types import OllamaCall, OllamaChatLine, OllamaEnd, OllamaMore, OllamaTextLine
from echo_trt.server.text_client import TextPiece
from echo_trt.server.translated import arguments_of
from echo_trt.server.turns import OutputParser


def line(requested: OllamaRequest, content: str, more: OllamaMore, end: OllamaEnd) -> OllamaChatLine | OllamaTextLine:
    """Return a whole answer, or a line of one; ``more`` stands beside the text."""
    model, now = requested.model, datetime.now(UTC).isoformat()
    if isinstance(requested, GenerateRequest):
        return {"model": model, "created_at": now, "response": content, **more, **end}
    return {"model": model, "created_at": now, "message": {"role": "assistant", "content": content, **more}, **end}


class OllamaAnswer(Answer[OllamaRequest]):
    """The answer to one request. Times are in nanoseconds."""

    media_type = "application/x-ndjson"

    def __init__(self, requested: OllamaRequest, turns: list[OutputParser], metrics: ServerMetrics):
        super().__init__(requested, turns, metrics)
        self._began, self._first = time.monotonic_ns(), 0

    def take(self, choice: int, piece: TextPiece) -> Iterator[AnswerEvent]:
        self._first = self._first or time.monotonic_ns()
        for delta in self._turn.take(piece):
            if "reasoning" in delta:
                yield self._line("", {"thinking": delta["reasoning"]})
            elif "content" in delta:
                yield self._line(delta["content"], {})
        if piece.finish_reason and self._turn.whole_calls:  # this API has whole calls alone
            yield self._line("", {"tool_calls": self._calls()})

    def end(self) -> Iterator[AnswerEvent]:
        yield line(self._requested, "", {}, self._end())

    def failed(self, error: ApiError) -> Iterator[AnswerEvent]:
        yield error.body_for("/api/chat")

    def complete(self) -> AnswerEvent:
        turn, more = self._turn, OllamaMore()
        if turn.reasoning:
            more["thinking"] = turn.reasoning
        if turn.whole_calls:
            more["tool_calls"] = self._calls()
        return line(self._requested, turn.content, more, self._end())

    def written(self, event: AnswerEvent) -> str:
        return json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n"

    def _line(self, content: str, more: OllamaMore) -> AnswerEvent:
        return line(self._requested, content, more, {"done": False})

    def _calls(self) -> list[OllamaCall]:
        functions = [call["function"] for call in self._turn.whole_calls]
        return [{"function": {"name": f["name"], "arguments": arguments_of(f["arguments"])}} for f in functions]

    def _end(self) -> OllamaEnd:
        ended = time.monotonic_ns()
        return {
            "done": True,
            "done_reason": "length" if self._turn.finish_reason == "length" else "stop",
            "total_duration": ended - self._began,
            "load_duration": 0,
            "prompt_eval_count": self._turn.newest.prompt_tokens,
            "prompt_eval_duration": self._first - self._began,
            "eval_count": self._turn.newest.completion_tokens,
            "eval_duration": ended - self._first,
        }
