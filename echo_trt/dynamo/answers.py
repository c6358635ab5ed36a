"""Answers on their way to Dynamo: the service's events, told on the engine's thread, become chunks of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from echo_trt.dynamo.request import Ask
from echo_trt.models.token_texts import TokenTexts
from echo_trt.runtime.params import TokenLogprobs
from echo_trt.serving.job import End, Event, Job
from echo_trt.serving.service import Service

#: How Dynamo calls the reasons of an end; others are failures.
REASONS = {"stop": "stop", "length": "length", "deadline": "length", "busy": "stop", "cancelled": "cancelled"}


class DynamoAnswer:
    """The answer to one request."""

    def __init__(self, service: Service, ask: Ask, texts: TokenTexts):
        self._service, self._ask, self._texts = service, ask, texts
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._job: Job | None = None

    def submit(self) -> None:
        """Queue the request; any thread may. Raises as ``Service.submit``."""
        ask = self._ask

        def tell(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._job = self._service.submit(ask.prompt, ask.params, tell, ask.priority, ask.seconds, ask.said)

    def cancel(self) -> None:
        """End it, if it has not ended; its KV blocks are free before the next iteration."""
        if self._job:
            self._service.cancel(self._job)

    async def chunks(self) -> AsyncIterator[tuple[dict[str, Any], End | None]]:
        """Yield Dynamo's chunks as they come; the last one with how the answer ended."""
        first, end = True, None
        while end is None:
            event = await self._next_event()
            end = event.end
            chunk: dict[str, Any] = {"token_ids": list(event.token_ids), "index": 0}
            if event.logprobs:
                chunk |= self._logprobs(event.logprobs)
            if first and event.token_ids:
                chunk |= self._ask.boundary.link()
                first = False
            if end:
                chunk |= self._last(end)
            yield chunk, end

    async def _next_event(self) -> Event:
        """All events there are, as one; waits for the first."""
        event = await self._events.get()
        while not self._events.empty():
            later = self._events.get_nowait()
            event = Event(
                text=event.text + later.text,
                token_ids=[*event.token_ids, *later.token_ids],
                logprobs=[*event.logprobs, *later.logprobs],
                time=later.time,
                end=later.end,
            )
        return event

    def _last(self, end: End) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "finish_reason": REASONS.get(end.reason, "error"),
            "completion_usage": {
                "prompt_tokens": end.prompt_tokens,
                "completion_tokens": end.completion_tokens,
                "total_tokens": end.prompt_tokens + end.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
            },
        }
        if self._job and self._ask.params.prompt_logprobs is not None:
            entries = self._job.request.prompt_logprobs
            chunk["engine_data"] = {"prompt_logprobs": [None, *map(self._prompt_entry, entries)]}
        return chunk

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "log_probs": [entry.logprob for entry in entries],
            "top_logprobs": [
                [
                    {
                        "rank": rank,
                        "token_id": token,
                        "token": self._text(token),
                        "logprob": logprob,
                        "bytes": list(self._texts.raw(token)),
                    }
                    for rank, (token, logprob) in enumerate(entry.top, 1)
                ]
                for entry in entries
            ],
        }

    def _prompt_entry(self, entry: TokenLogprobs) -> dict[str, dict[str, Any]]:
        known = dict(entry.top) | {entry.token: entry.logprob}
        return {str(t): {"logprob": logprob, "decoded_token": self._text(t)} for t, logprob in known.items()}

    def _text(self, token: int) -> str:
        return self._texts.raw(token).decode("utf-8", "replace")
