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

    Thresholds and budget are calibrated beforehand. It learns one thing while it runs, how often a single request stops
    at the first gate: that decides how a device drafts, and no tree.
    """

    def __init__(self, name: str, settings: EchoSettings):
        self.name, self.settings, self.budget = name, settings, settings.budget or 0
        self._stopped = 0.0  # share of single requests that stopped at the first gate, of late

    def level_shapes(self, requests: int) -> list[LevelShape]:
        return self.settings.level_shapes(requests)

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        settings = self.settings
        gate_by_gate = draft.looks_ahead and settings.max_depth > 1
        early = self._stopped > 0.5
        candidates, claimed_node = grow(roots, draft, settings, load.max_draft_len, gate_by_gate, early)
        if len(roots) == 1 and settings.gates and load.max_draft_len[0] > min(settings.gates):
            stopped = candidates.depth[claimed_node[0]] < min(settings.gates)
            self._stopped += _PACE * (float(stopped) - self._stopped)
        tree, nodes = candidates.sorted_by_request(allocate(candidates, claimed_node, settings))
        chances = np.exp(candidates.score.astype(np.float64))
        return Plan(tree, chances[nodes], Explanation(candidates, chances, nodes, gates=settings.gates))
