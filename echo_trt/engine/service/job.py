"""A request on its way through the service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from echo_trt.engine.request import Event, Request
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


@dataclass(eq=False)
class Job:
    """A request that the service answers. A tenant's jobs are ordered as they are served: by priority, lowest first,
    then by when the first token is due, which without targets is by arrival.

    on_event                      takes the answer's events; it must not block
    seconds                       from submission to the deadline, which ends the answer; None: no deadline
    request_id                    the client's, for the log
    deadline, taken, first_token  time.monotonic(); None: there is none, or it has not come
    emitted                       time.monotonic() of its latest tokens; None: there are none
    expected                      what was forecast when it came
    begun, reported               whether there was an event, and tokens that events have told
    failures                      of the engine while this request was running, in a row
    failed_together, failed_at    the same beside others, without progress; its tokens at the latest of these
    """

    request: Request
    on_event: Callable[[Event], None] = lambda event: None
    seconds: float | None = None
    request_id: str = ""
    deadline: float | None = None
    taken: float | None = None
    first_token: float | None = None
    emitted: float | None = None
    expected: ExpectedLatency = ExpectedLatency()
    begun: bool = False
    reported: int = 0
    failures: int = 0
    failed_together: int = 0
    failed_at: int = 0

    @property
    def named(self) -> dict[str, str]:
        """The ``extra`` of a line of the log about it."""
        return {"request_id": self.request_id or str(self.request.id)}

    @property
    def latency(self) -> Latency:
        return Latency.of(self.request.params.latency)

    @property
    def tenant(self) -> bytes:
        return self.request.sender.tenant

    def take(self, tokens: list[int]) -> Event:
        """Return the event of new tokens."""
        begin, self.reported = self.reported, self.reported + len(tokens)
        event, request = Event(token_ids=tokens), self.request
        if request.params.entries:
            event.logprobs = request.logprobs[begin : self.reported]
            event.sources = request.sources[begin : self.reported]
        return event

    def __lt__(self, other: Job) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, float, int]:
        return self.request.priority, self.latency.due(self.request.submitted), self.request.id
