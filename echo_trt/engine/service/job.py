"""A request on its way through the service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Event, Request
from echo_trt.engine.service.protocol import FIRST
from echo_trt.speculation.pacer import Latency


@dataclass(frozen=True)
class ExpectedLatency:
    """Seconds to the first token, and per token behind it; None: nothing like it has run yet."""

    ttft: float | None = None
    tpot: float | None = None


class Overloaded(Exception):
    """No request is taken now; another time or another server may. The message is one sentence.

    kind         "queue_full", "late" (latency targets cannot be kept) or "away" (the engine stops)
    retry_after  seconds until a request may be taken; None: not known
    """

    def __init__(self, kind: Literal["queue_full", "late", "away"], message: str, retry_after: int | None = None):
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


class Late(Overloaded):
    """A request's latency targets, or those of running requests, cannot be kept now."""

    def __init__(self, seconds: int):
        super().__init__("late", f"latency cannot be kept now; try again in {seconds} s.", seconds)


@dataclass(eq=False, kw_only=True)
class ServiceRequest(Request):
    """A request that the service answers. A tenant's jobs are ordered as they are served: by priority, lowest first,
    then by when the first token is due, which without targets is by arrival.

    on_event                                 takes the answer's events; it must not block
    seconds                                  from submission to the deadline, which ends the answer; None: no deadline
    deadline, submitted, taken, first_token  time.monotonic(); None: there is none, or it has not come
    request_id                               the client's, for the log
    failures                                 of the engine while this request was running, in a row
    failed_together, failed_at               the same beside others, without progress; its tokens at the latest of these
    expected                                 what was forecast when it came
    emitted                                  time.monotonic() of its latest tokens; None: there are none
    reported                                 tokens that events have told
    """

    id: int = -1  # the service's, by arrival
    prompt: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    params: SamplingParams = field(default_factory=SamplingParams)
    on_event: Callable[[Event], None] = lambda event: None
    seconds: float | None = None
    deadline: float | None = None
    taken: float | None = None
    first_token: float | None = None
    failures: int = 0
    failed_together: int = 0
    failed_at: int = 0
    expected: ExpectedLatency = ExpectedLatency()
    emitted: float | None = None
    reported: int = 0
    request_id: str = ""

    @property
    def named(self) -> dict[str, str]:
        """The ``extra`` of a line of the log about it."""
        return {"request_id": self.request_id or str(self.id)}

    @property
    def latency(self) -> Latency:
        return Latency.of(self.params.latency)

    @property
    def probe(self) -> bool:
        """Whether it only asks if the engine works."""
        return self.priority == FIRST and self.params.max_tokens == 1

    def take(self, tokens: Sequence[int] = ()) -> Event:
        """Return the event of new tokens."""
        begin, self.reported = self.reported, self.reported + len(tokens)
        event = Event(token_ids=tokens)
        if self.params.entries:
            event.logprobs, event.sources = self.logprobs[begin : self.reported], self.sources[begin : self.reported]
        return event

    def __lt__(self, other: ServiceRequest) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, float, int]:
        return self.priority, self.latency.due(self.submitted), self.id
