"""One answer in the shape of the Responses API, whole and as typed server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from echo_trt.gateway.answers import Usage, chained, entries
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
        self._output, self._usage = Output(spaces), Usage(1)
        self._waiting: list[Entry] = []  # logprobs whose text is not certain yet
        self._id, self._created = "resp_" + secrets.token_hex(24), int(time.time())
        self._number = 0  # of the next event
        self._cut = False  # whether the text was cut short

    async def whole(self, pieces: Pieces) -> dict[str, Any]:
        """The body of an answer that is not streamed, once its text has ended."""
        async for _, piece in pieces:
            for _event in self._take(piece):
                pass
        self._count()
        return self._body(self._status, self._usage)

    async def events(self, first: tuple[int, Piece], pieces: Pieces) -> AsyncIterator[str]:
        """Server-sent events. A failure on the way is an event too, for the status has long been sent."""
        try:
            for kind in ("created", "in_progress"):
                yield self._told({"type": f"response.{kind}", "response": self._body("in_progress")})
            async for _, piece in chained(first, pieces):
                for event in self._take(piece):
                    yield self._told(event)
            body = self._body(self._status, self._usage)
            yield self._told({"type": f"response.{self._status}", "response": body})
        except ApiError as error:
            told = self._asked.ours(error).body["error"]
            code = told["code"] or "server_error"
            yield self._told({"type": "error", **told, "code": code} | {"type": "error"})
            body = self._body("failed", self._usage) | {"error": {"code": code, "message": told["message"]}}
            yield self._told({"type": "response.failed", "response": body})
        except ClientGone:
            self._metrics.disconnects.inc()
        finally:
            self._count()

    @property
    def _status(self) -> str:
        return "incomplete" if self._cut else "completed"

    def _take(self, piece: Piece) -> Iterator[Event]:
        self._waiting += entries(piece.logprobs)
        for delta in self._turn.take(piece):
            logprobs: list[Entry] = []
            if delta.get("content") and self._asked.chat.logprobs:
                logprobs, self._waiting = self._waiting, []
            yield from self._output.take(delta, logprobs)
        if piece.finish_reason:
            self._usage.add(0, piece, self._turn)
            self._cut = piece.finish_reason == "length"
            yield from self._output.end(self._status)

    def _told(self, event: Event) -> str:
        numbered = event | {"sequence_number": self._number}
        self._number += 1
        text = json.dumps(numbered, ensure_ascii=False, separators=(",", ":"))
        return f"event: {event['type']}\ndata: {text}\n\n"

    def _body(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        """``usage`` is left out while there is none."""
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
            "usage": _counted(usage) if usage else None,
        }

    def _count(self) -> None:
        self._metrics.prompt_tokens.inc(self._usage.prompt)
        self._metrics.completion_tokens.inc(self._usage.completion)


def _counted(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": usage.prompt + usage.completion,
    }
