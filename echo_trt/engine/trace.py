"""The trace of one step, which the engine core hands to its step callback."""

from __future__ import annotations

from dataclasses import dataclass

from echo_trt.speculation.planner import Iteration


@dataclass(frozen=True)
class StepTrace:
    """One step, as the step callback gets it.

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
