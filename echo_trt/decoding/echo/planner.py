"""The paper's planner: draft and gate, then allocate one budget over the batch."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.echo.grow import grow
from echo_trt.decoding.echo.pivot import allocate
from echo_trt.decoding.echo.settings import EchoSettings
from echo_trt.decoding.planner import Draft, Load, Plan, Planner


class EchoPlanner(Planner):
    """ECHO and its ablations: ``static`` (no gates, no shared budget), ``dense``, ``fixed`` and ``echo``.

    Thresholds and budget are calibrated beforehand, so that it learns nothing while it runs.
    """

    def __init__(self, name: str, settings: EchoSettings):
        self.name, self.settings, self.budget = name, settings, settings.budget or 0

    def plan(self, roots: np.ndarray, draft: Draft, load: Load) -> Plan:
        settings = self.settings
        if load.looks_ahead and settings.max_depth > 1:  # levels are cheaper there than a look at a gate between them
            # A gate looks at the best children, the budget at the best nodes. Larger: more to copy from a device.
            share = max(32, 4 * self.budget // max(len(load.slots), 1)) if self.budget else 4 * settings.per_request
            most = min(4 * settings.per_request, share)
            draft.look_ahead(settings.max_depth - 1, settings.beams, settings.width, most)
        candidates, claimed_node = grow(roots, draft, settings, load.room)
        tree, nodes = candidates.sorted_by_request(allocate(candidates, claimed_node, settings))
        chances = np.exp(candidates.score.astype(np.float64))
        return Plan(tree, chances[nodes], candidates, nodes=nodes, chances=chances, gates=settings.gates)
