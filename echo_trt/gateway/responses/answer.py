"""One answer in the shape of the Responses API, whole and as typed server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from echo_trt.gateway.answers import chained
from echo_trt.gateway.choices import ClientGone, Pieces
from echo_trt.gateway.errors import ApiError
from echo_trt.gateway.logprobs import Entry
from echo_trt.gateway.metrics import Metrics
from echo_trt.gateway.responses.output import Event, Output
from echo_trt.gateway.responses.request import ResponsesRequest
from echo_trt.gateway.responses.tools import Hosted
from echo_trt.gateway.turns import Turn
from echo_trt.serving.wire import Piece


class Response:
    """The answer to one request, of one text. ``turn`` reads that text."""

    def __init__(self, asked: ResponsesRequest, turn: Turn, metrics: Metrics):
        self._asked, self._turn, self._metrics = asked, turn, metrics
        spaces = {each.name: (each.namespace, each.tool.name) for each in asked.functions if each.namespace is not None}
        self._output = Output(spaces)
        self._id, self._created = "resp_" + secrets.token_hex(24), int(time.time())
        self._number = 0  # of the next event
        self._cut = False  # whether the text was cut short

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        """The body of an answer that is not streamed, once its text has ended."""
        async for _, piece in pieces:
            for _event in self._take(piece):
                pass
        self._count()
        return self._body(self._status)

    async def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[str]:
        """Server-sent events. A failure on the way is an event too, for the status has long been sent."""
        try:
            for kind in ("created", "in_progress"):
                yield self._told({"type": f"response.{kind}", "response": self._body("in_progress")})
            async for _, piece in chained(first, pieces):
                for event in self._take(piece):
                    yield self._told(event)
            body = self._body(self._status)
            yield self._told({"type": f"response.{self._status}", "response": body})
        except ApiError as error:
            told = self._asked.ours(error).body["error"]
            code = told["code"] or "server_error"
            yield self._told({"type": "error", **told, "code": code} | {"type": "error"})
            body = self._body("failed") | {"error": {"code": code, "message": told["message"]}}
            yield self._told({"type": "response.failed", "response": body})
        except ClientGone:
            self._metrics.disconnects.inc()
        finally:
            self._count()

    @property
    def _status(self) -> str:
        return "incomplete" if self._cut else "completed"

    def _take(self, piece: Piece) -> Iterator[Event]:
        for delta in self._turn.take(piece):
            logprobs: list[Entry] = []
            if delta.get("content") and self._asked.chat.logprobs:
                logprobs, _ = self._turn.take_details()
            yield from self._output.take(delta, logprobs)
        if piece.finish_reason:
            self._cut = piece.finish_reason == "length"
            yield from self._output.end(self._status)

    def _told(self, event: Event) -> str:
        numbered = event | {"sequence_number": self._number}
        self._number += 1
        text = json.dumps(numbered, ensure_ascii=False, separators=(",", ":"))
        return f"event: {event['type']}\ndata: {text}\n\n"

    def _body(self, status: str) -> dict[str, Any]:
        asked, chat = self._asked, self._asked.chat
        choice, ended = asked.tool_choice or "auto", status == "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if ended else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata,
            "model": asked.model,
            "output": self._output.items,
            "parallel_tool_calls": chat.parallel_tool_calls is not False,
            "presence_penalty": chat.presence_penalty,
            "frequency_penalty": chat.frequency_penalty,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": chat.temperature,
            "text": {"format": asked.text.format or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools if not isinstance(tool, Hosted)],
            "top_logprobs": chat.top_logprobs,
            "top_p": chat.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _counted(self._turn),
        }

    def _count(self) -> None:
        self._metrics.prompt_tokens.inc(self._turn.prompt_tokens)
        self._metrics.completion_tokens.inc(self._turn.completion_tokens)


def _counted(turn: Turn) -> dict[str, Any]:
    return {
        "input_tokens": turn.prompt_tokens,
        "input_tokens_details": {"cached_tokens": turn.cached_tokens},
        "output_tokens": turn.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": turn.reasoning_tokens},
        "total_tokens": turn.prompt_tokens + turn.completion_tokens,
    }
