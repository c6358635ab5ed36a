"""Requests that wait for a slot: each tenant's in their own order, and slots are shared by tenants."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from echo_trt.engine.service.job import ServiceRequest
from echo_trt.engine.service.protocol import FIRST


class FairQueue:
    """A heap for each tenant. Without API keys there is one tenant, and jobs come in their order."""

    def __init__(self) -> None:
        self._heaps: dict[bytes, list[ServiceRequest]] = {}

    def __iter__(self) -> Iterator[ServiceRequest]:
        for heap in list(self._heaps.values()):  # statistics do not hold the lock
            yield from list(heap)

    def __len__(self) -> int:
        return sum(map(len, list(self._heaps.values())))

    def add(self, job: ServiceRequest) -> None:
        heapq.heappush(self._heaps.setdefault(job.tenant, []), job)

    def pop(self, running: Counter[bytes]) -> ServiceRequest:
        """Take the next job: one of the tenant that has the fewest ``running``, by its order among tenants with as few.

        A probe comes before all.
        """
        heap = min(self._heaps.values(), key=lambda heap: (heap[0].priority > FIRST, running[heap[0].tenant], heap[0]))
        job = heapq.heappop(heap)
        if not heap:
            del self._heaps[job.tenant]
        return job

    def before(self, job: ServiceRequest) -> list[ServiceRequest]:
        """Return about what is served before a job: its tenant's earlier ones, and as many of each other tenant."""
        own = [other for other in self._heaps.get(job.tenant, []) if other < job]
        others = (heapq.nsmallest(len(own) + 1, heap) for tenant, heap in self._heaps.items() if tenant != job.tenant)
        return own + [other for found in others for other in found if other < job]

    def remove(self, job: ServiceRequest) -> None:
        """Forget a job, if it is here."""
        heap = self._heaps.get(job.tenant, [])
        if job in heap:
            heap.remove(job)
            heapq.heapify(heap)
            if not heap:
                del self._heaps[job.tenant]
