"""What of an open answer has not been sent yet, whoever sends it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from echo_trt.engine.process.logprobs import Outgoing
from echo_trt.engine.process.metrics import EngineMetrics
from echo_trt.engine.process.request import ParsedRequest
from echo_trt.engine.process.sources import OutgoingSources
from echo_trt.engine.service.job import RequestOutput, ServiceRequest
from echo_trt.engine.service.protocol import FIRST
from echo_trt.engine.service.service import Service
from echo_trt.models.token_texts import TokenTexts


@dataclass(eq=False, kw_only=True)
class Pending:
    """An open answer.

    arrived            time.monotonic() at which its request came
    broken             whether a part of it was lost, so that it ends with an error
    logprobs, sources  None where the request does not ask for them
    last               time of the last event with tokens; None: none has come
    """

    arrived: float
    broken: bool = False
    ask: ParsedRequest | None = None
    job: ServiceRequest | None = None
    logprobs: Outgoing | None = None
    sources: OutgoingSources | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    last: float | None = None

    def understand(self, ask: ParsedRequest, texts: TokenTexts) -> None:
        """Take what the request asks for."""
        self.ask, self.text = ask, ask.echoed
        if ask.params.logprobs is not None or ask.params.prompt_logprobs is not None:
            self.logprobs = Outgoing(texts, ask.echoed)
        if ask.params.token_sources:
            self.sources = OutgoingSources(texts)

    def take(self, event: RequestOutput) -> None:
        """Add an event to what has not been sent."""
        assert self.ask
        self.text += event.text
        self.token_ids += event.token_ids
        if self.logprobs and self.last is None and self.ask.params.prompt_logprobs is not None:
            while self.job is None:  # its first event may come before ``submit`` has returned
                time.sleep(0.001)
            self.logprobs.begin(self.ask.prompt, self.job.request.prompt_logprobs)
        if self.logprobs:
            self.logprobs.take(event.logprobs, event.offsets)
        if self.sources:
            self.sources.take(event.sources, event.offsets)

    def observe(self, event: RequestOutput, metrics: EngineMetrics) -> None:
        """Tell the times of an event that was taken; a probe's would hide the clients' on a quiet server."""
        client = self.ask is not None and self.ask.priority != FIRST
        if client and self.last is not None and event.token_ids:
            metrics.observe("inter_token", (event.time - self.last) / len(event.token_ids))
        if event.token_ids:
            self.last = event.time
        if client and event.end:
            metrics.ended(event.end, event.time - self.arrived)

    def cancel(self, service: Service) -> None:
        """End the request, if it was queued and has not ended."""
        if self.job:
            service.cancel(self.job)
