"""One answer in the shape of the Responses API, whole and as typed server-sent events that tell of its items."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from echo_trt.server.answer_types import ChatToken, MessageDelta
from echo_trt.server.answers import Answer, AnswerEvent, TokenLogprob, chat_logprobs, completion_details
from echo_trt.server.errors import ApiError
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.responses.request import ResponsesRequest
from echo_trt.server.responses.tools import Hosted
from echo_trt.server.responses.types import ResponseObject, ResponseStatus, ResponseUsage, StreamedEvent
from echo_trt.server.text_client import TextPiece
from echo_trt.server.turns import OutputParser

PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
#: Of items with a text: its part's type, which is also in the names of its events.
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


class Response(Answer[ResponsesRequest]):
    """The answer to one request."""

    def __init__(self, requested: ResponsesRequest, turns: list[OutputParser], metrics: ServerMetrics):
        super().__init__(requested, turns, metrics)
        spaces = {
            each.name: (each.namespace, each.tool.name) for each in requested.functions if each.namespace is not None
        }
        self._output = Output(spaces)
        self._number = 0  # of the next event
        self._cut = False  # whether the text was cut short

    def complete(self) -> ResponseObject:
        return self._body(self._status)

    def begin(self, first: TextPiece) -> Iterator[StreamedEvent]:
        yield {"type": "response.created", "response": self._body("in_progress")}
        yield {"type": "response.in_progress", "response": self._body("in_progress")}

    def end(self) -> Iterator[StreamedEvent]:
        body = self._body(self._status)
        yield {"type": "response.incomplete" if self._cut else "response.completed", "response": body}

    def failed(self, error: ApiError) -> Iterator[StreamedEvent]:
        reported = error.body["error"]
        code, message = reported["code"] or "server_error", reported["message"]
        yield {"type": "error", "code": code, "message": message, "param": reported["param"]}
        body: ResponseObject = {**self._body("failed"), "error": {"code": code, "message": message}}
        yield {"type": "response.failed", "response": body}

    @property
    def _status(self) -> Literal["incomplete", "completed"]:
        return "incomplete" if self._cut else "completed"

    def take(self, choice: int, piece: TextPiece) -> Iterator[AnswerEvent]:
        for delta in self._turn.take(piece):
            logprobs: list[TokenLogprob] = []
            if delta.get("content") and self._requested.chat.logprobs:
                logprobs, _ = self._turn.take_details()
            yield from self._output.take(delta, logprobs)
        if piece.finish_reason:
            self._cut = piece.finish_reason == "length"
            yield from self._output.end(self._status)

    def written(self, event: AnswerEvent) -> str:
        self._number += 1
        return super().written({**event, "sequence_number": self._number - 1})

    def _body(self, status: ResponseStatus) -> ResponseObject:
        requested, chat = self._requested, self._requested.chat
        choice, ended = requested.tool_choice or "auto", status == "completed"
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if ended else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": requested.instructions,
            "max_output_tokens": requested.max_output_tokens,
            "max_tool_calls": None,
            "metadata": requested.metadata,
            "model": requested.model,
            "output": self._output.items,
            "parallel_tool_calls": chat.parallel_tool_calls is not False,
            "presence_penalty": chat.presence_penalty,
            "frequency_penalty": chat.frequency_penalty,
            "previous_response_id": None,
            "reasoning": {"effort": requested.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": chat.temperature,
            "text": {"format": requested.text.format or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in requested.tools if not isinstance(tool, Hosted)],
            "top_logprobs": chat.top_logprobs,
            "top_p": chat.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _counted(self._turn),
        }


def _counted(turn: OutputParser) -> ResponseUsage:
    counts = turn.newest
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": turn.reasoning_tokens, **completion_details([turn])},
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }


class Output:
    """Takes deltas of a chat. ``items`` and what events hold of them grow: an event must be written before the next."""

    def __init__(self, namespaces: Mapping[str, tuple[str, str]] | None = None) -> None:
        """``namespaces``: name of a function in the chat -> its namespace, and its name there."""
        self._namespaces = namespaces or {}
        self.items: list[Any] = []
        self._part: dict[str, Any] = {}  # of the open item, where that has a text
        self._open = False

    def take(self, delta: MessageDelta, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[AnswerEvent]:
        """``logprobs`` are of the delta's content."""
        if text := delta.get("reasoning"):
            yield from self._text("reasoning", text, ())
        if text := delta.get("content"):
            yield from self._text("message", text, chat_logprobs(logprobs)["content"])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                namespace, name = self._namespaces.get(call["function"]["name"], (None, call["function"]["name"]))
                within = {"namespace": namespace} if namespace is not None else {}
                more = {"call_id": call["id"], **within, "name": name, "arguments": ""}
                yield from self._begin("function_call", more)
            if arguments := call["function"]["arguments"]:
                self.items[-1]["arguments"] += arguments
                yield self._event("function_call_arguments.delta", delta=arguments)

    def end(self, status: str) -> Iterator[AnswerEvent]:
        """``status`` is that of the last item, for it may have been cut short."""
        if not self.items:
            yield from self._begin("message", {"role": "assistant", "content": []})
        yield from self._close(status)

    def _text(self, kind: str, text: str, logprobs: Sequence[ChatToken]) -> Iterator[AnswerEvent]:
        if not self._open or self.items[-1]["type"] != kind:
            own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
            yield from self._begin(kind, {**own, "content": []})
        self._part["text"] += text
        more = {"logprobs": list(logprobs)} if kind == "message" else {}
        self._part.get("logprobs", []).extend(logprobs)
        yield self._event(f"{PARTS[kind]}.delta", content_index=0, delta=text, **more)

    def _begin(self, kind: str, more: dict[str, Any]) -> Iterator[AnswerEvent]:
        yield from self._close("completed")
        item = {"id": PREFIXES[kind] + secrets.token_hex(16), "type": kind, "status": "in_progress", **more}
        self.items.append(item)
        self._open = True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}
        if kind in PARTS:
            own: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "message" else {}
            self._part = {"type": PARTS[kind], "text": "", **own}
            item["content"].append(self._part)
            yield self._event("content_part.added", content_index=0, part=self._part)

    def _close(self, status: str) -> Iterator[AnswerEvent]:
        if not self._open:
            return
        item, part = self.items[-1], self._part
        if item["type"] in PARTS:
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._event(f"{part['type']}.done", content_index=0, text=part["text"], **more)
            yield self._event("content_part.done", content_index=0, part=part)
        else:
            yield self._event("function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        item["status"], self._open = status, False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **more: Any) -> AnswerEvent:
        item = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **item, **more}
