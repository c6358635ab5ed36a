"""The paper's planner: draft and gate, then allocate one budget over the batch."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.echo.grow import grow
from echo_trt.decoding.echo.pivot import allocate
from echo_trt.decoding.echo.settings import EchoSettings
from echo_trt.decoding.planner import Draft, Iteration, Load, Plan


class EchoPlanner:
    """ECHO and its ablations: ``static`` (no gates, no shared budget), ``dense``, ``fixed`` and ``echo``."""

    def __init__(self, name: str, settings: EchoSettings):
        self.name, self.settings, self.budget = name, settings, settings.budget or 0

    def plan(self, roots: np.ndarray, draft: Draft, load: Load) -> Plan:
        if self.settings.spare(len(roots)) == 0:
            return Plan.undrafted(roots)
        candidates, reach = grow(roots, draft, self.settings, load.room)
        tree, _ = candidates.sorted_by_request(allocate(candidates, reach, self.settings))
        return Plan(tree, np.exp(tree.score.astype(np.float64)), candidates)

    def observe(self, iteration: Iteration) -> None:
        pass  # thresholds and budget are calibrated beforehand

    def totals(self) -> dict[str, dict[str, float]]:
        return {}
