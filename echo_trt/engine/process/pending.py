"""A request with what of its answer has not been sent yet, whoever sends it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from echo_trt.engine.process.entries import OutgoingLogprobs, OutgoingSources
from echo_trt.engine.process.prompts import PromptReader
from echo_trt.engine.process.wire import Failure
from echo_trt.engine.request import Event
from echo_trt.engine.service.job import ERRORS, Overloaded, ServiceRequest
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.engine.service.protocol import FIRST
from echo_trt.engine.text import AnswerText
from echo_trt.errors import TooLong, UserError

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Pending(ServiceRequest):
    """An open answer.

    arrived                          time.monotonic() at which its request came
    broken                           whether a part of it was lost, so that it ends with an error
    streamed                         whether its client gets text as it comes
    statistics                       whether its client wants them
    in_thought                       whether the prompt ends inside a thought; None for a model that does not think
    text                             of the answer so far
    unsent_logprobs, unsent_sources  None where the request does not ask for them
    last                             time of the last event with tokens; None: none has come
    """

    arrived: float = 0.0
    broken: bool = False
    streamed: bool = False
    statistics: bool = False
    in_thought: bool | None = None
    text: AnswerText | None = None
    unsent_text: str = ""
    unsent_tokens: list[int] = field(default_factory=list)
    unsent_logprobs: OutgoingLogprobs | None = None
    unsent_sources: OutgoingSources | None = None
    last: float | None = None

    def begin(self, echoed: str, prompts: PromptReader) -> None:
        """Begin with ``echoed``, text that precedes the answer in the output; ``params`` are known."""
        self.unsent_text, self.text, texts = echoed, prompts.answer_text(self.params), prompts.texts
        if self.params.logprobs is not None or self.params.prompt_logprobs is not None:
            self.unsent_logprobs = OutgoingLogprobs(texts, echoed)
        if self.params.token_sources:
            self.unsent_sources = OutgoingSources(texts)

    def add(self, event: Event) -> bool:
        """Take an event's tokens, and cut off what follows a stop string.

        Returns whether a stop string has just been completed, by which the service is to end the request.
        """
        assert self.text
        before = self.text.stopped
        piece, used, offsets = self.text.take(event.token_ids, bool(event.reason) and event.reason != "failed")
        event.token_ids, event.logprobs = event.token_ids[:used], event.logprobs[:used]
        event.sources = event.sources[:used]
        if self.text.stopped and event.reason and event.reason not in ERRORS:
            event.reason, event.completion_tokens = "stop", self.text.used
        self.unsent_text += piece
        self.unsent_tokens += event.token_ids
        if self.unsent_logprobs:
            if self.last is None and self.params.prompt_logprobs is not None:
                self.unsent_logprobs.begin(self.prompt.tolist(), self.prompt_logprobs)
            self.unsent_logprobs.take(event.logprobs, offsets)
        if self.unsent_sources:
            self.unsent_sources.take(event.sources, offsets)
        return bool(self.text.stopped) and not before and not event.reason

    def observe(self, event: Event, metrics: EngineMetrics) -> None:
        """Tell the times of an event that was taken; a probe's would hide the clients' on a quiet server."""
        client = self.priority != FIRST
        if client and self.last is not None and event.token_ids:
            metrics.observe("inter_token_seconds", (event.time - self.last) / len(event.token_ids))
        if event.token_ids:
            self.last = event.time
        if client and event.reason:
            metrics.ended(event, event.time - self.arrived)


def refusal(metrics: EngineMetrics, work: Callable[[], None], request_id: str = "") -> Failure | None:
    """Do the work; return why the request cannot be taken, None where it is."""
    try:
        work()
        return None
    except UserError as mistake:
        outcome, failure = "invalid", Failure(kind="invalid", message=str(mistake), field=mistake.field)
        if isinstance(mistake, TooLong):
            failure.kind = "too_long"
    except Overloaded as full:
        field = "latency" if full.kind == "late" else None
        outcome, failure = "refused", Failure(kind=full.kind, message=str(full), field=field)
        failure.retry_after = full.retry_after
    except Exception as error:  # logged; others go on
        log.exception("a request could not be read", extra={"request_id": request_id})
        outcome, failure = "failed", Failure(kind="failed", message=f"the request could not be read ({error}).")
    metrics.refuse(outcome)
    return failure


def failure_of(event: Event, id: int = 0) -> Failure:
    """Return the failure that an event ends an answer with, whose reason is one of ``ERRORS``."""
    failure = Failure(id, kind="failed", message=event.message or "the request was cancelled.")
    if event.reason == "invalid":  # a grammar that was compiled in the queue
        failure.kind, failure.field = "invalid", "structured"
    elif event.reason == "cancelled":
        failure.kind = "cancelled"
    return failure
