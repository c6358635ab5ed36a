"""Snapshots of the engine's latest iterations, for the live page.

A snapshot holds shapes and figures, neither text nor tokens: a viewer need not be the client whose answer is made.
``recent`` has columns, an entry per iteration since the last snapshot, times in Unix seconds and milliseconds; ``last``
is the latest iteration that verified anything, or None. Its ``requests`` have an ``id`` and columns, an entry per node,
parents before children:

    parent: index of the node above, -1 at the root
    source: 0 head, 1 lookup, 2 both, 3 ngram, 4 grammar, 5 prediction, 6 call, 7 answer; 0 at the root
    chance: the planner's P(accept), 0 to 1
    fate: 0 root (the request's last token), 1 accepted, 2 verified and rejected, 3 considered and not verified

``SNAPSHOT_FORMAT`` changes with a name, a unit or a meaning, not with an added field.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np

from echo_trt.engine.core import StepTrace
from echo_trt.engine.service import SNAPSHOT_FORMAT
from echo_trt.engine.service.metrics import COUNTERS, Statistics
from echo_trt.engine.service.service import Service
from echo_trt.speculation.arrays import begins
from echo_trt.speculation.super_tree import SuperTree

ITERATIONS = 64  # iterations kept between two snapshots; larger: longer lists at small loads
MAX_REQUESTS = 64  # requests whose trees a snapshot holds; larger: longer snapshots at large loads
MAX_NODES, MIN_NODES = 1536, 8  # nodes of all trees together, and of one; larger: more nodes that were not verified
ROOT, ACCEPTED, REJECTED, PRUNED = range(4)  # what became of a node
TOTALS = tuple(name for name in COUNTERS if name != "evicted_blocks")


class SnapshotRecorder:
    """Records the steps of a service's engine core while it is ``on``.

    One thread may call this.
    """

    def __init__(self, service: Service):
        self._service = service
        self.seen: deque[StepTrace] = deque(maxlen=ITERATIONS)  # since the last snapshot
        self._last: StepTrace | None = None  # the latest that verified anything
        self._seconds = 0.0  # of CPU time, that all snapshots took
        self.on = False

    def switch(self, on: bool) -> None:
        """Begin to collect, or stop and forget the iterations so far."""
        self.on = on
        self._service.loop.step_callback = self.seen.append if on else None
        if not on:
            self.seen.clear()
            self._last = None

    def snapshot(self) -> dict[str, Any]:
        """Return the iterations since the last snapshot, and the service now, as JSON has them."""
        begin = time.thread_time()
        seen = [self.seen.popleft() for _ in range(len(self.seen))]
        self._last = next((each for each in reversed(seen) if each.requests), self._last)
        now = figures(self._service.statistics(), self._service.loop.batch.count)
        now["recent"] = recent(seen)
        now["last"] = tree_of(self._last, self._service.loop.proposer) if self._last else None
        now["seconds"]["snapshots"] = round(self._seconds, 4)
        self._seconds += time.thread_time() - begin
        return now


def figures(now: Statistics, slots: int) -> dict[str, Any]:
    counters = now.counters
    return {
        "format": SNAPSHOT_FORMAT,
        "policy": now.policy,
        "budget": now.budget,
        "slots": slots,
        "running": now.running,
        "queued": now.queued,
        "blocks": {"all": now.blocks, "held": now.blocks_used, "cached": now.blocks_cached},
        "gain": None if now.gain is None else round(now.gain, 3),
        "saved": [round(sum(now.saved.values()), 2), round(now.saved_error, 2)],
        "latency": {name: [count, kept["both"]] for name, (count, kept) in now.latency.items()},
        "totals": {name: getattr(counters, name) for name in TOTALS},
        "seconds": {phase: round(seconds, 4) for phase, seconds in counters.seconds.items()},
    }


def recent(seen: list[StepTrace]) -> dict[str, list[float]]:
    """Return columns of figures, each with one entry for an iteration, oldest first."""
    return {
        "time": [round(each.time, 3) for each in seen],
        "milliseconds": [round(1000 * each.iteration.seconds, 2) for each in seen],
        "requests": [len(each.requests) for each in seen],
        "verified": [len(each.iteration.plan.tree) for each in seen],
        "accepted": [len(each.iteration.path) - len(each.requests) for each in seen],
        "emitted": [each.emitted for each in seen],
        "rung": [each.iteration.plan.explanation.verification_size for each in seen],
        "prompt_tokens": [each.iteration.load.prompt_tokens for each in seen],
    }


def tree_of(seen: StepTrace, proposer: int) -> dict[str, Any]:
    """Return one iteration as JSON has it: the milliseconds of its parts, and the tree of each request.

    proposer  source that nodes of the source DRAFT are reported as (``EngineCore.proposer``)
    """
    iteration, explanation = seen.iteration, seen.iteration.plan.explanation
    parts = {"plan": iteration.planning, "draft": seen.drafting, "verify": iteration.target.seconds}
    parts["other"] = max(iteration.seconds - sum(parts.values()), 0.0)
    tree, fate = explanation.candidates, fates(seen)
    kept = kept_nodes(tree, fate, explanation.chances)
    part, nodes = tree.sorted_by_request(kept)
    first = begins(part.sizes)
    parent = np.where(part.parent >= 0, part.parent - first[part.request], -1)
    source = np.maximum(part.source, proposer)
    chances = np.round(explanation.chances[nodes], 3)
    return {
        "time": round(seen.time, 3),
        "milliseconds": {name: round(1000 * seconds, 2) for name, seconds in parts.items()},
        "rung": explanation.verification_size,
        "padded_to": iteration.plan.padded_to,
        "computed": iteration.target.tokens,
        "gates": {str(depth): threshold for depth, threshold in explanation.gates.items()},
        "requests": [
            {
                "id": seen.requests[request],
                "parent": parent[begin:end].tolist(),
                "source": source[begin:end].tolist(),
                "chance": chances[begin:end].tolist(),
                "fate": fate[nodes[begin:end]].tolist(),
            }
            for request, (begin, end) in enumerate(pairwise(first.tolist()))
            if end > begin
        ],
        "omitted": max(tree.num_requests - MAX_REQUESTS, 0),
    }


def fates(seen: StepTrace) -> np.ndarray:
    """Return the fate of every candidate: int64 [n], ROOT, ACCEPTED, REJECTED or PRUNED."""
    explanation = seen.iteration.plan.explanation
    fate = np.full(len(explanation.candidates), PRUNED)
    fate[explanation.nodes] = REJECTED
    fate[explanation.nodes[seen.iteration.path]] = ACCEPTED
    fate[explanation.candidates.parent < 0] = ROOT
    return fate


def kept_nodes(tree: SuperTree, fate: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Choose the candidates that a snapshot holds: int64, ascending, each with its parent.

    They are of the first MAX_REQUESTS requests: verified nodes first, then the likeliest of the others.

    fate     int64 [n], of ``fates``
    chances  float64 [n], estimated chance that a node is accepted
    """
    maximum = max(MAX_NODES // max(min(tree.num_requests, MAX_REQUESTS), 1), MIN_NODES)
    worth = np.where(fate == PRUNED, chances, 2.0 + chances)  # a child's chance is its parent's at most
    nodes = np.flatnonzero((tree.request < MAX_REQUESTS) & (worth > 0))
    kept = np.zeros(len(tree), bool)
    kept[tree.best_first(nodes, worth[nodes], np.full(tree.num_requests, maximum))] = True
    for node in np.flatnonzero(kept & (tree.parent >= 0)).tolist():  # parents come before their children
        kept[node] = kept[tree.parent[node]]
    return np.flatnonzero(kept)
