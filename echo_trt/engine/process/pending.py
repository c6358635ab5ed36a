"""What a host knows of an answer that it sends, whoever reads it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from echo_trt.engine.process.wire import Failure, failure_for
from echo_trt.engine.request import FIRST, Event
from echo_trt.engine.service.job import Job, Overloaded
from echo_trt.engine.service.metrics import EngineMetrics
from echo_trt.errors import UserError

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Pending:
    """An open answer to a job.

    arrived   time.monotonic() at which its request came
    broken    whether a part of it was lost, so that it ends with an error
    streamed  whether its client gets news as they come
    last      time of the last event with tokens; None: none has come
    """

    job: Job
    arrived: float = field(default_factory=time.monotonic)
    broken: bool = False
    streamed: bool = False
    last: float | None = None

    def observe(self, event: Event, metrics: EngineMetrics) -> None:
        """Tell the times of an event that was taken; a probe's would hide the clients' on a quiet server."""
        client = self.job.request.priority != FIRST
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
        outcome, failure = "invalid", failure_for(mistake)
    except Overloaded as full:
        outcome, failure = "refused", Failure(kind=full.kind, message=str(full))
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
