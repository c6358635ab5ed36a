"""What one iteration looks like to those who look on."""

from __future__ import annotations

from dataclasses import dataclass

from echo_trt.decoding.planner import Iteration


@dataclass(frozen=True)
class Seen:
    """One iteration, for those who look on.

    requests  ids of the B decoding requests, in the order of the plan's trees
    drafting  seconds of the draft's passes
    emitted   tokens that texts gained
    time      of its end, time.time()
    """

    iteration: Iteration
    requests: list[int]
    drafting: float
    emitted: int
    time: float
