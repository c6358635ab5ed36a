"""Answers on their way to Dynamo: the service's events become chunks of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from echo_trt.adapters.dynamo.migration import Boundary
from echo_trt.engine.params import TokenLogprobs
from echo_trt.engine.process.pending import Pending
from echo_trt.engine.request import Event
from echo_trt.engine.service.service import Service
from echo_trt.engine.text.stream import AnswerText
from echo_trt.models.token_texts import TokenTexts

#: How Dynamo calls the reasons of an end; others are failures.
REASONS = {"stop": "stop", "length": "length", "deadline": "length", "busy": "stop", "cancelled": "cancelled"}


@dataclass(eq=False, kw_only=True)
class DynamoAnswer(Pending):
    """An answer to Dynamo's frontend; ``generated`` of its request are tokens that another worker has emitted.

    boundary  for the worker that may have to go on with this answer
    text      finds stop strings; None: there are none
    """

    boundary: Boundary
    text: AnswerText | None = None
    service: Service | None = None
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    def submit(self, service: Service) -> None:
        """Queue the request; its answer is for the running event loop. Raises as ``Service.submit``."""
        loop, self.service = asyncio.get_running_loop(), service

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.job.on_event = tell
        service.submit(self.job)

    def cancel(self) -> None:
        """End the request, if it was queued and has not ended."""
        if self.service:
            self.service.cancel(self.job)

    async def chunks(self, texts: TokenTexts) -> AsyncIterator[tuple[dict[str, Any], Event]]:
        """Yield Dynamo's chunks as they come, each with its event; events that came meanwhile are one.

        Where there are stop strings, ``text`` finds them.
        """
        first, event = True, Event()
        while not event.reason:
            event = await self.events.get()
            while not self.events.empty():
                event = self.events.get_nowait().appended_to(event)
            if self.text:
                _, _, stops = self.text.read(event)
                if stops and self.service:
                    self.service.stop(self.job, self.text.used)
            chunk: dict[str, Any] = {"token_ids": event.token_ids, "index": 0}
            if event.logprobs:
                chunk |= _logprobs(event.logprobs, texts)
            if first and event.token_ids:
                chunk |= self.boundary.link()
                first = False
            if event.reason:
                chunk |= self._last(event, texts)
            yield chunk, event

    def _last(self, end: Event, texts: TokenTexts) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "finish_reason": REASONS.get(end.reason, "error"),
            "completion_usage": {
                "prompt_tokens": end.prompt_tokens,
                "completion_tokens": end.completion_tokens,
                "total_tokens": end.prompt_tokens + end.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
            },
        }
        if self.job.request.params.prompt_logprobs is not None:
            entries = [_prompt_entry(entry, texts) for entry in self.job.request.prompt_logprobs]
            chunk["engine_data"] = {"prompt_logprobs": [None, *entries]}
        return chunk


def _logprobs(entries: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    return {
        "log_probs": [entry.logprob for entry in entries],
        "top_logprobs": [
            [
                {
                    "rank": rank,
                    "token_id": token,
                    "token": _text(token, texts),
                    "logprob": logprob,
                    "bytes": list(texts.raw(token)),
                }
                for rank, (token, logprob) in enumerate(entry.top, 1)
            ]
            for entry in entries
        ],
    }


def _prompt_entry(entry: TokenLogprobs, texts: TokenTexts) -> dict[str, dict[str, Any]]:
    known = dict(entry.top) | {entry.token: entry.logprob}
    return {str(t): {"logprob": logprob, "decoded_token": _text(t, texts)} for t, logprob in known.items()}


def _text(token: int, texts: TokenTexts) -> str:
    return texts.raw(token).decode("utf-8", "replace")
