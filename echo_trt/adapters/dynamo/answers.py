"""Answers on their way to Dynamo: the service's events become chunks of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from echo_trt.adapters.dynamo.request import WorkerRequest
from echo_trt.engine.params import TokenLogprobs
from echo_trt.engine.process.client import DirectAnswer
from echo_trt.engine.service.job import FinishInfo
from echo_trt.engine.service.service import Service
from echo_trt.models.token_texts import TokenTexts

#: How Dynamo calls the reasons of an end; others are failures.
REASONS = {"stop": "stop", "length": "length", "deadline": "length", "busy": "stop", "cancelled": "cancelled"}


class DynamoAnswer(DirectAnswer):
    """The answer to one request."""

    def __init__(self, service: Service, ask: WorkerRequest, texts: TokenTexts):
        super().__init__(service)
        self._ask, self._texts = ask, texts

    def begin(self) -> None:
        """Queue the request; any thread may. Raises as ``Service.submit``."""
        ask = self._ask
        self.submit(ask.prompt, ask.params, ask.priority, ask.seconds, ask.prior_tokens)

    async def chunks(self) -> AsyncIterator[tuple[dict[str, Any], FinishInfo | None]]:
        """Yield Dynamo's chunks as they come; the last one with how the answer ended."""
        first = True
        async for event in self.events():
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

    def _last(self, end: FinishInfo) -> dict[str, Any]:
        chunk: dict[str, Any] = {
            "finish_reason": REASONS.get(end.reason, "error"),
            "completion_usage": {
                "prompt_tokens": end.prompt_tokens,
                "completion_tokens": end.completion_tokens,
                "total_tokens": end.prompt_tokens + end.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
            },
        }
        if self.job and self._ask.params.prompt_logprobs is not None:
            entries = self.job.request.prompt_logprobs
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
