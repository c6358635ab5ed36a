"""One answer in the shape of Anthropic's Messages API, whole and as server-sent events that tell of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from echo_trt.engine.process.wire import TextPiece
from echo_trt.server.answers import Answer, AnswerEvent
from echo_trt.server.anthropic.request import MessagesRequest
from echo_trt.server.errors import ApiError
from echo_trt.server.translated import arguments_of

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
#: Type of a block -> the type of its deltas, and their field.
DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}


class MessagesAnswer(Answer[MessagesRequest]):
    """The answer to one request."""

    _stop_string = ""
    _index, _kind = -1, ""  # of the block that is open; without a kind none is

    def begin(self, first: TextPiece) -> Iterator[AnswerEvent]:
        message = self.complete()
        message["usage"]["input_tokens"] = first.prompt_tokens
        yield {"type": "message_start", "message": message | {"content": []}}

    def take(self, choice: int, piece: TextPiece) -> Iterator[AnswerEvent]:
        self._stop_string = piece.stop_string
        for delta in self._turn.take(piece):
            for kind, name in (("thinking", "reasoning"), ("text", "content")):
                if text := delta.get(name):
                    if self._kind != kind:
                        yield from self._open(_block(kind, ""))
                    yield self._added(text)
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    yield from self._open(_call(call))
                if arguments := call["function"]["arguments"]:
                    yield self._added(arguments)

    def end(self) -> Iterator[AnswerEvent]:
        yield from self._close()
        ended = self.complete()
        delta = {name: ended[name] for name in ("stop_reason", "stop_sequence", "stop_details")}
        yield {"type": "message_delta", "delta": delta, "usage": ended["usage"]}
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterator[AnswerEvent]:
        yield error.body_for("/v1/messages")

    def complete(self) -> dict[str, Any]:
        turn = self._turn
        texts = {"thinking": turn.reasoning, "text": turn.content}
        stopped = self._stop_string if turn.finish_reason == "stop" else ""
        return {
            "id": f"msg_{self._id}",
            "type": "message",
            "role": "assistant",
            "model": self._requested.model,
            "content": [_block(kind, text) for kind, text in texts.items() if text] + [*map(_call, turn.calls)],
            "stop_reason": "stop_sequence" if stopped else REASONS.get(turn.finish_reason),
            "stop_sequence": stopped or None,
            "stop_details": None,
            "usage": {
                "input_tokens": turn.prompt_tokens - turn.cached_tokens,  # the API counts these apart
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": turn.cached_tokens,
                "output_tokens": turn.completion_tokens,
            },
        }

    def _open(self, block: dict[str, Any]) -> Iterator[AnswerEvent]:
        yield from self._close()
        self._index, self._kind = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _added(self, text: str) -> AnswerEvent:
        kind, field = DELTAS[self._kind]
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, field: text}}

    def _close(self) -> Iterator[AnswerEvent]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}


def _block(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})


def _call(call: dict[str, Any]) -> dict[str, Any]:
    arguments = arguments_of(call["function"]["arguments"])
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}
