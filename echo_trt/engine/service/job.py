"""A request on its way through the service, and the queue in which it waits for a slot."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from echo_trt.engine.request import FIRST, Event, Request
from echo_trt.speculation.pacer import Latency

LATELY = 60.0  # seconds; larger: a tenant finds a free slot after a longer silence, and others go without it longer
RESERVED = 8  # the part of the slots, one in so many, that no tenant alone takes while others have come lately


class Overloaded(Exception):
    """No request is taken now; another time or another server may. The message is one sentence.

    kind         "queue_full" or "away" (the engine stops)
    retry_after  seconds until a request may be taken; None: not known
    """

    def __init__(self, kind: Literal["queue_full", "away"], message: str, retry_after: int | None = None):
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


@dataclass(eq=False)
class Job:
    """A request that the service answers. A tenant's jobs are ordered as they are served: by priority, lowest first,
    then by when the first token is due, which without targets is by arrival.

    on_event                      takes the answer's events; it must not block
    seconds                       from submission to the deadline, which ends the answer; None: no deadline
    request_id                    the client's, for the log
    deadline, taken, first_token  time.monotonic(); None: there is none, or it has not come
    emitted                       time.monotonic() of its latest tokens; None: there are none
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


class FairQueue:
    """A heap for each tenant. Without API keys there is one tenant, and jobs come in their order. ``slots``: of all."""

    def __init__(self, slots: int) -> None:
        self._slots, self._heaps = slots, dict[bytes, list[Job]]()
        self._came: dict[bytes, float] = {}  # when each tenant's latest job came, by time.monotonic()

    def __iter__(self) -> Iterator[Job]:
        for heap in list(self._heaps.values()):  # statistics do not hold the lock
            yield from list(heap)

    def __len__(self) -> int:
        return sum(map(len, list(self._heaps.values())))

    def add(self, job: Job) -> None:
        heapq.heappush(self._heaps.setdefault(job.tenant, []), job)
        if not job.request.probe:
            now = time.monotonic()
            came = {tenant: when for tenant, when in self._came.items() if when > now - LATELY}
            self._came = came | {job.tenant: now}

    def pop(self, running: Counter[bytes]) -> Job | None:
        """Take the next job: one of the tenant that has the fewest ``running``, by its order among tenants with as few.

        A probe comes before all. None: nobody waits, or only a tenant that has all slots but the others' few.
        """
        if not self._heaps:
            return None
        heap = min(self._heaps.values(), key=lambda h: (h[0].request.priority > FIRST, running[h[0].tenant], h[0]))
        first = heap[0]
        if first.request.priority > FIRST and running[first.tenant] >= self._most(first.tenant):
            return None
        job = heapq.heappop(heap)
        if not heap:
            del self._heaps[job.tenant]
        return job

    def _most(self, tenant: bytes) -> int:
        """Return the slots that a tenant may have."""
        recent = time.monotonic() - LATELY
        others = any(when > recent for other, when in self._came.items() if other != tenant)
        return self._slots - max(self._slots // RESERVED, 1) if others and self._slots > 1 else self._slots

    def remove(self, job: Job) -> None:
        """Forget a job, if it is here."""
        heap = self._heaps.get(job.tenant, [])
        if job in heap:
            heap.remove(job)
            heapq.heapify(heap)
            if not heap:
                del self._heaps[job.tenant]
