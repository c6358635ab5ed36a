"""AdaServe's selection of draft tokens (arXiv 2501.12162), retold: targets first, then throughput, on a fixed budget.

Every request's tree is drafted to the same depth and beams, less of both at a higher load. Each request, the one that
is to catch up most first, takes its best nodes until it expects the tokens that its target asks of this pass. The rest
of the budget goes to the best nodes of all.
"""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import Explanation, Iteration, Plan, Planner, StepContext
from echo_trt.speculation.super_tree import SuperTree

NEWEST = 0.1  # weight of the newest pass in the mean time of one; larger: follows a change sooner


class AdaServePlanner(Planner):
    name = "adaserve"

    def __init__(self, acceptance: Acceptance, settings: GoodputSettings, budget: int):
        self.budget, self._acceptance, self._settings, self._seconds = budget, acceptance, settings, 0.0

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        count, settings, width = len(roots), self._settings, self._settings.width
        free = self.budget - count  # prompts are computed beside it
        depth = int(np.clip(free // count, 1, settings.max_depth))
        beams = int(np.clip(free // count, 1, settings.beams))
        open_ = np.flatnonzero(load.max_draft_len > 0)
        if free < 1 or len(open_) == 0:
            return Plan.undrafted(roots)
        candidates = Candidates(SuperTree.from_roots(roots), self._acceptance, np.ones(count), load.max_draft_len)
        if draft.looks_ahead:
            draft.look_ahead(depth, beams, width, settings.per_request)
        candidates.add(open_, *draft.expand_roots(open_), width)
        for level in range(1, depth):
            frontier = np.sort(candidates.frontier(level, beams))
            if len(frontier):
                candidates.add(frontier, *draft.expand(candidates.tree, frontier), width)
        chosen = self._select(candidates, load, free, depth)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        chances = candidates.probability
        return Plan(tree, chances[nodes], Explanation(candidates.tree, chances, nodes))

    def _select(self, candidates: Candidates, load: StepContext, free: int, depth: int) -> np.ndarray:
        """Choose roots and up to ``free`` nodes: int64, ascending."""
        tree, value = candidates.tree, candidates.probability
        roots = tree.num_requests
        wanted = np.zeros(roots)
        if load.pace:
            wanted = np.where(load.pace.wanted > 0, load.pace.lag + load.pace.wanted * self._seconds, 0.0)
        nodes = roots + np.flatnonzero(value[roots:] > 0)
        best = nodes[np.argsort(1e-12 * tree.depth[nodes] - value[nodes], kind="stable")]
        chosen = np.zeros(len(tree), bool)
        for request in np.argsort(-wanted, kind="stable"):
            needed, own = min(wanted[request], depth + 1) - 1, best[tree.request[best] == request]
            if needed <= 0 or free <= 0:
                break
            number = min(
                int(np.searchsorted(value[own].cumsum(), needed)) + 1, free, self._settings.per_request - 1, len(own)
            )
            chosen[own[:number]] = True
            free -= number
        chosen[best[~chosen[best]][:free]] = True
        return np.concatenate((np.arange(roots), np.flatnonzero(chosen)))

    def observe(self, iteration: Iteration) -> None:
        self._seconds += NEWEST * (iteration.seconds - self._seconds) if self._seconds else iteration.seconds
