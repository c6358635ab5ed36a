"""The paper's planner: draft and gate, then allocate one budget over the batch."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.echo.grow import grow
from echo_trt.speculation.echo.pivot import allocate
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.pack import LevelShape
from echo_trt.speculation.planner import Explanation, Plan, Planner, StepContext

_PACE = 0.1  # of what is learnt from an iteration; larger: drafts follow a text sooner, and noise more


class EchoPlanner(Planner):
    """ECHO (``echo``), and the baseline ``static``: no gates, no shared budget.

    Thresholds and budget are calibrated beforehand. It learns one thing while it runs, how often a single request ends
    at each gate: that decides where a device waits for the host, and no tree.
    """

    def __init__(self, name: str, settings: EchoSettings):
        self.name, self.settings, self.budget = name, settings, settings.budget or 0
        self._stops = dict.fromkeys(settings.gates, 0.0)  # gate -> share of the single requests there that it ended

    def level_shapes(self, requests: int) -> list[LevelShape]:
        return self.settings.level_shapes(requests)

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        settings = self.settings
        gate_by_gate = draft.looks_ahead and settings.max_depth > 1
        candidates, claimed_node = grow(roots, draft, settings, load.max_draft_len, gate_by_gate, self._stops)
        if len(roots) == 1:
            self._learn(int(candidates.depth[claimed_node[0]]), int(load.max_draft_len[0]))
        tree, nodes = candidates.sorted_by_request(allocate(candidates, claimed_node, settings))
        chances = np.exp(candidates.score.astype(np.float64))
        return Plan(tree, chances[nodes], Explanation(candidates, chances, nodes, gates=settings.gates))

    def _learn(self, claimed: int, max_draft_len: int) -> None:
        """Learn which gates a single request has passed that claims ``claimed`` of ``max_draft_len`` levels."""
        for gate in self._stops:
            if gate <= min(claimed + 1, max_draft_len):
                self._stops[gate] += _PACE * (float(gate > claimed) - self._stops[gate])
