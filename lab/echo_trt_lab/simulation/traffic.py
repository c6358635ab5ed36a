"""Requests that come and go: their prompts wait for a slot, are computed in chunks beside others' tokens, and answered.

A ``Replay`` makes the iterations, with the planners' own code, and its passes move the clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.arrays import begins
from echo_trt.speculation.pacer import NONE, Latency, Pacer, Seats
from echo_trt_lab.simulation.arrivals import Arrival
from echo_trt_lab.simulation.replay import Replay
from echo_trt_lab.simulation.walk import Recording, Walk

CHUNK = 256  # prompt tokens of an iteration at most, as in the runtime


@dataclass
class Answered:
    """What came of a request: seconds on the trace's clock, ``tokens``, and its longest ``wait`` for a next token."""

    arrival: Arrival
    first: float
    last: float
    tokens: int
    wait: float

    @property
    def ttft(self) -> float:
        return self.first - self.arrival.time

    @property
    def tpot(self) -> float:
        """Seconds per token behind the first."""
        return (self.last - self.first) / max(self.tokens - 1, 1)

    def kept(self, latency: Latency) -> bool:
        return latency.kept(self.ttft, self.tpot)


class Traffic(Walk):
    """``slots`` for requests of a trace. ``classes``: targets by class, which planners see where there are any."""

    def __init__(self, recording: Recording, slots: int, arrivals: Sequence[Arrival], classes: dict[str, Latency]):
        super().__init__(recording, slots, 0)
        self.running, self._classes, self.pacer = np.zeros(0, np.int64), classes, Pacer(slots)
        self._coming, self.now = list(reversed(arrivals)), 0.0
        self._waiting: list[tuple[float, int, Arrival]] = []
        self._missing = np.zeros(slots, np.int64)
        self._requests: dict[int, Arrival] = {}  # by slot
        self._open: dict[int, Answered] = {}
        self.done: list[Answered] = []
        self.tokens = 0

    def serve(self, replay: Replay, until: float) -> None:
        """Iterate until a time, or until every request has its answer."""
        while self.now < until and (self._coming or self._waiting or self._requests):
            self._admit()
            if self._requests:
                self._iterate(replay)
            elif self._coming:
                self.now = max(self.now, self._coming[-1].time)

    def unanswered(self, kind: str) -> int:
        """Count the requests of a class that have come and have no answer yet."""
        waiting = [arrival for *_, arrival in self._waiting] + list(self._requests.values())
        return sum(arrival.kind == kind for arrival in waiting)

    def _latency(self, arrival: Arrival) -> Latency:
        return self._classes.get(arrival.kind, NONE)

    def _admit(self) -> None:
        while self._coming and self._coming[-1].time <= self.now:
            arrival = self._coming.pop()
            heapq.heappush(self._waiting, (self._latency(arrival).due(arrival.time), -len(self._coming), arrival))
        free = (slot for slot in range(self.batch) if slot not in self._requests)
        for slot in free:
            if not self._waiting:
                return
            *_, arrival = heapq.heappop(self._waiting)
            self._requests[slot], self._missing[slot] = arrival, arrival.prompt
            self.prompt[slot], self.epoch[slot] = arrival.prompt, self._admissions
            self._admissions += 1
            self.pacer.begin(slot, self._latency(arrival), arrival.time)

    def _iterate(self, replay: Replay) -> None:
        slots = np.array(sorted(self._requests, key=lambda slot: self.epoch[slot]))
        decoding = slots[self._missing[slots] == 0]
        self.running = decoding
        seats = Seats(decoding, self.context, slots[self._missing[slots] > 0], CHUNK)
        seats = self.pacer.admit(seats, lambda seats: seats.within(replay.planner.admit(seats)), self.now)
        self.running, prefilling = seats.decoding, seats.prompts
        counts = np.clip(seats.chunk - begins(self._missing[prefilling])[:-1], 0, self._missing[prefilling])
        chunked = prefilling[counts > 0]
        cached = int((self.prompt[chunked] - self._missing[chunked]).sum())
        ran = self.running
        step = replay.step(int(counts.sum()), cached, seats.pace)
        self.now += step.seconds
        self._missing[prefilling] -= counts
        started = prefilling[self._missing[prefilling] == 0]
        for slot in started.tolist():
            self._begin(slot, int(self.prompt[slot]))
            self._open[slot] = Answered(self._requests[slot], self.now, self.now, 1, 0.0)
        for slot, tokens in zip(ran.tolist(), step.tokens.tolist(), strict=True):
            outcome = self._open[slot]
            outcome.wait, outcome.last = max(outcome.wait, self.now - outcome.last), self.now
            outcome.tokens += tokens
        emitted = np.concatenate((step.tokens, np.ones(len(started), np.int64)))
        self.pacer.emitted(np.concatenate((ran, started)), emitted, self.now)
        self.pacer.ran(ran, np.ones(len(ran), np.int64), step.seconds, int(counts.sum()))
        self.tokens += int(emitted.sum())
        for slot in step.kept.ended.tolist():
            self.done.append(self._open.pop(slot))
            del self._requests[slot]
            self.pacer.end(slot)

    def _end(self, slot: int) -> None:
        """Leave the slot free."""
