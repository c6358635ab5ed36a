"""Requests that wait for a slot: each tenant's in their own order, and slots are shared by tenants."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Iterator

from echo_trt.engine.request import FIRST
from echo_trt.engine.service.job import Job

LATELY = 60.0  # seconds; larger: a tenant finds a free slot after a longer silence, and others go without it longer
RESERVED = 8  # the part of the slots, one in so many, that no tenant alone takes while others have come lately


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

        def rank(heap: list[Job]) -> tuple[bool, int, Job]:
            return heap[0].request.priority > FIRST, running[heap[0].tenant], heap[0]

        waits, held, first = rank(heap := min(self._heaps.values(), key=rank))
        if waits and held >= self._most(first.tenant):
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

    def before(self, job: Job) -> list[Job]:
        """Return about what is served before a job: its tenant's earlier ones, and as many of each other tenant."""
        own = [other for other in self._heaps.get(job.tenant, []) if other < job]
        others = (heapq.nsmallest(len(own) + 1, heap) for tenant, heap in self._heaps.items() if tenant != job.tenant)
        return own + [other for found in others for other in found if other < job]

    def remove(self, job: Job) -> None:
        """Forget a job, if it is here."""
        heap = self._heaps.get(job.tenant, [])
        if job in heap:
            heap.remove(job)
            heapq.heapify(heap)
            if not heap:
                del self._heaps[job.tenant]
