"""One answer in the shape of Anthropic's Messages API, whole and as server-sent events that tell of its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from echo_trt.server.answers import Answer, AnswerEvent
from echo_trt.server.anthropic import types
from echo_trt.server.anthropic.request import MessagesRequest
from echo_trt.server.errors import ApiError
from echo_trt.server.text_client import TextPiece
from echo_trt.server.translated import arguments_of

REASONS: dict[str, Literal["end_turn", "max_tokens", "tool_use"]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}


class MessagesAnswer(Answer[MessagesRequest]):
    """The answer to one request."""

    _index, _kind = -1, ""  # of the block that is open; without a kind none is
    _called: types.ToolUse | None = None  # a call whose arguments have not come

    def begin(self, first: TextPiece) -> Iterator[types.MessageEvent]:
        message = self.complete()
        message["usage"]["input_tokens"] = first.prompt_tokens
        yield {"type": "message_start", "message": {**message, "content": []}}

    def take(self, choice: int, piece: TextPiece) -> Iterator[types.MessageEvent]:
        for delta in self._turn.take(piece):
            for kind, text in (("thinking", delta.get("reasoning")), ("text", delta.get("content"))):
                if text:
                    if self._kind != kind:
                        yield from self._open(_block(kind, ""))
                    yield self._added(text)
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    self._called = _call(call["id"], call["function"]["name"], "")
                if arguments := call["function"]["arguments"]:  # a call that is cut before them is no block
                    if self._called:
                        yield from self._open(self._called)
                    self._called = None
                    yield self._added(arguments)

    def end(self) -> Iterator[types.MessageEvent]:
        yield from self._close()
        yield {"type": "message_delta", "delta": self._end(), "usage": self.complete()["usage"]}
        yield {"type": "message_stop"}

    def failed(self, error: ApiError) -> Iterator[AnswerEvent]:
        yield error.body_for("/v1/messages")

    def complete(self) -> types.AnthropicMessage:
        turn, counts = self._turn, self._turn.newest
        texts = {"thinking": turn.reasoning, "text": turn.content}
        calls = [_call(call["id"], **call["function"]) for call in turn.whole_calls]
        return {
            "id": f"msg_{self._id}",
            "type": "message",
            "role": "assistant",
            "model": self._requested.model,
            "content": [*(_block(kind, text) for kind, text in texts.items() if text), *calls],
            **self._end(),
            "usage": {
                "input_tokens": counts.prompt_tokens - counts.cached_tokens,  # the API counts these apart
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": counts.cached_tokens,
                "output_tokens": counts.completion_tokens,
            },
        }

    def _end(self) -> types.MessageEnd:
        stopped = self._turn.newest.stop_string if self._turn.finish_reason == "stop" else ""
        reason = REASONS.get(self._turn.finish_reason)
        return {
            "stop_reason": "stop_sequence" if stopped else reason,
            "stop_sequence": stopped or None,
            "stop_details": None,
        }

    def _open(self, block: types.Block) -> Iterator[types.BlockStart | types.BlockStop]:
        yield from self._close()
        self._index, self._kind = self._index + 1, block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _added(self, text: str) -> types.BlockDelta:
        part: types.BlockPart = {"type": "input_json_delta", "partial_json": text}
        if self._kind != "tool_use":
            thinks = self._kind == "thinking"
            part = {"type": "thinking_delta", "thinking": text} if thinks else {"type": "text_delta", "text": text}
        return {"type": "content_block_delta", "index": self._index, "delta": part}

    def _close(self) -> Iterator[types.BlockStop]:
        if self._kind:
            self._kind = ""
            yield {"type": "content_block_stop", "index": self._index}


def _block(kind: str, text: str) -> types.Block:
    if kind == "thinking":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _call(id: str, name: str, arguments: str) -> types.ToolUse:
    return {"type": "tool_use", "id": id, "name": name, "input": arguments_of(arguments)}
