"""The paper's planner: draft and gate, then allocate one budget over the batch.

Where a head drafts on the device, all levels run in one launch, before the host reads a gate. Gates then limit what is
verified, and not what is drafted.
"""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.echo.grow import grow
from echo_trt.speculation.echo.pivot import allocate
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.planner import Explanation, Plan, Planner, StepContext


class EchoPlanner(Planner):
    """ECHO (``echo``), its ablations ``dense`` and ``fixed``, and the baseline ``static``: no gates, no shared budget.

    Thresholds and budget are calibrated beforehand, so that it learns nothing while it runs.
    """

    def __init__(self, name: str, settings: EchoSettings):
        self.name, self.settings, self.budget = name, settings, settings.budget or 0

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        settings = self.settings
        if draft.looks_ahead and settings.max_depth > 1:  # a level is cheaper than a wait for the device between levels
            # The ``max_nodes`` best nodes of a request are copied to the host, enough for gates and budget. Larger: the
            # copy takes longer.
            share = max(32, 4 * self.budget // max(len(load.slots), 1)) if self.budget else 4 * settings.per_request
            max_nodes = min(4 * settings.per_request, share)
            draft.look_ahead(settings.max_depth - 1, settings.beams, settings.width, max_nodes)
        candidates, claimed_node = grow(roots, draft, settings, load.max_draft_len)
        tree, nodes = candidates.sorted_by_request(allocate(candidates, claimed_node, settings))
        chances = np.exp(candidates.score.astype(np.float64))
        return Plan(tree, chances[nodes], Explanation(candidates, chances, nodes, gates=settings.gates))
