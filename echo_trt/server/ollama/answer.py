"""One answer in the shape of Ollama's API: an object, or a line of JSON per piece."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from echo_trt.engine.process.wire import TextPiece
from echo_trt.server.answers import Answer, AnswerEvent
from echo_trt.server.errors import ApiError
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.ollama.request import GenerateRequest, OllamaRequest
from echo_trt.server.translated import arguments_of
from echo_trt.server.turns import OutputParser


def head(requested: OllamaRequest, content: str = "", **more: Any) -> AnswerEvent:
    """Return a line's model, time and text; ``more`` stands beside the text."""
    about = {"model": requested.model, "created_at": datetime.now(UTC).isoformat()}
    if isinstance(requested, GenerateRequest):
        return {**about, "response": content, **more}
    return {**about, "message": {"role": "assistant", "content": content, **more}}


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
                yield self._line(thinking=delta["reasoning"])
            elif "content" in delta:
                yield self._line(delta["content"])
        if piece.finish_reason and self._turn.calls:  # this API has whole calls alone
            yield self._line(tool_calls=self._calls())

    def end(self) -> Iterator[AnswerEvent]:
        yield head(self._requested) | self._end()

    def failed(self, error: ApiError) -> Iterator[AnswerEvent]:
        yield error.body_for("/api/chat")

    def complete(self) -> AnswerEvent:
        turn = self._turn
        thinking = {"thinking": turn.reasoning} if turn.reasoning else {}
        calls = {"tool_calls": self._calls()} if turn.calls else {}
        return head(self._requested, turn.content, **thinking, **calls) | self._end()

    def written(self, event: AnswerEvent) -> str:
        return json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n"

    def _line(self, content: str = "", **more: Any) -> AnswerEvent:
        return head(self._requested, content, **more) | {"done": False}

    def _calls(self) -> list[dict[str, Any]]:
        functions = [call["function"] for call in self._turn.calls]
        return [{"function": each | {"arguments": arguments_of(each["arguments"])}} for each in functions]

    def _end(self) -> AnswerEvent:
        ended = time.monotonic_ns()
        return {
            "done": True,
            "done_reason": "length" if self._turn.finish_reason == "length" else "stop",
            "total_duration": ended - self._began,
            "load_duration": 0,
            "prompt_eval_count": self._turn.prompt_tokens,
            "prompt_eval_duration": self._first - self._began,
            "eval_count": self._turn.completion_tokens,
            "eval_duration": ended - self._first,
        }
