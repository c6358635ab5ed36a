"""The record of one iteration that the loop hands to its watch."""

from __future__ import annotations

from dataclasses import dataclass

from echo_trt.decoding.planner import Iteration


@dataclass(frozen=True)
class Seen:
    """One iteration, as the loop's watch gets it.

    requests  ids of the B decoding requests, in the order of the plan's trees
    drafting  seconds of the draft's passes
    emitted   tokens that were appended to texts
    time      time.time() at the iteration's end
    """

    iteration: Iteration
    requests: list[int]
    drafting: float
    emitted: int
    time: float
