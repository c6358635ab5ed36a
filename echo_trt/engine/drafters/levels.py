"""A head's draft whose levels run on the device before the host sees any: they are then read one by one, for free."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.engine.drafters.eagle3 import Eagle3Drafter, EngineDraft
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.drafts import KnownTrees, Proposals
from echo_trt.speculation.pack import ForwardBatch, LevelShape, pack_levels
from echo_trt.speculation.super_tree import SuperTree


class LevelsEngine(Engine, Protocol):
    """An engine of a head that also drafts levels where it computes; ``backends.cuda.levels`` has the arrays."""

    def capture_levels(self, shapes: Callable[[int], Collection[LevelShape]]) -> None:
        """Prepare the drafts that are asked for, by their number of requests."""

    def padded_requests(self, requests: int) -> int:
        """Return the number of requests to which a level of ``requests`` is padded."""

    def start_levels(
        self, call: ForwardBatch, below: ForwardBatch, shape: LevelShape, max_nodes: int, **inputs: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run ``call``, whose logit rows are the roots', and the first levels, ``below``.

        Returns int32 [A, 2k], the bits of the roots' scores and their children, and what ``run_levels`` returns.
        """

    def run_levels(self, below: ForwardBatch, rows: np.ndarray, shape: LevelShape, max_nodes: int) -> np.ndarray:
        """Run further levels of the requests in ``rows`` of the call before: int32 [A, 4, M], see ``Levels.run``."""


class Ahead(NamedTuple):
    """What ``Draft.look_ahead`` was told, and which has not run yet."""

    depth: int
    beams: int
    width: int
    maximum: int


class LevelsDrafter(Eagle3Drafter):
    """An EAGLE-3 head whose engine drafts several levels without a return to the host."""

    engine: LevelsEngine

    def begin(self, slots: np.ndarray) -> LevelsDraft:
        return LevelsDraft(self, slots)

    def start_levels(
        self, slots: np.ndarray, below: ForwardBatch, shape: LevelShape, max_nodes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Catch up and draft the levels of ``below``; see ``LevelsEngine.start_levels``."""

        def run(slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
            call, inputs = self._packed(slots, start, counts, np.cumsum(counts) - 1)
            roots, drafted = self.engine.start_levels(call, below, shape, max_nodes, **inputs)
            return {"roots": roots, "drafted": drafted}

        outputs, _ = self.prefill_draft(slots, run)
        return outputs["roots"], outputs["drafted"]


class LevelsDraft(EngineDraft):
    """One iteration of a head on a device: level by level, or several levels at once where the planner asks for it."""

    _drafter: LevelsDrafter
    _ahead: Ahead | None = None
    _trees: DraftedTrees | None = None
    _depth = 1  # of the drafted trees
    _running: np.ndarray  # requests of the newest levels
    looks_ahead = True

    def look_ahead(self, depth: int, beams: int, width: int, maximum: int) -> None:
        self._ahead = Ahead(depth, min(beams, width), width, maximum)

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        if not self._ahead:
            return super().propose_roots(requests)
        drafter, slots = self._drafter, self._slots[requests]
        lag = int(drafter.draft_lag(slots).sum())
        self.ran(next_size(drafter.engine.sizes, lag), int(self._past[requests].sum()))
        width, (below, shape, maximum) = self._ahead.width, self._next_levels(requests)
        roots, drafted = drafter.start_levels(slots, below, shape, maximum)
        scores, tokens = np.split(roots, 2, axis=1)
        log_q = np.ascontiguousarray(scores[:, :width]).view(np.float32)
        self._trees = DraftedTrees(requests, len(self._slots), log_q, tokens[:, :width].astype(np.int64))
        self._trees.add(requests, drafted)
        return self._trees.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        if not self._trees:
            return super().propose(tree, nodes)
        if self._ahead:
            requests = np.unique(tree.request[nodes])
            rows = np.searchsorted(self._running, requests)
            below, shape, maximum = self._next_levels(requests)
            self._trees.add(requests, self._drafter.engine.run_levels(below, rows, shape, maximum))
        return self._trees.expand(tree, nodes)

    def _next_levels(self, requests: np.ndarray) -> tuple[ForwardBatch, LevelShape, int]:
        """Return the call and the shape of the levels that ``look_ahead`` asked for, and the nodes to return."""
        assert self._ahead is not None
        drafter, (depth, beams, width, maximum) = self._drafter, self._ahead
        shape = LevelShape(self._depth, depth - self._depth, beams, width)
        self._ahead, self._depth, self._running = None, depth, requests
        past = self._past[requests]
        for _ in range(shape.levels):
            self.ran(drafter.engine.padded_requests(len(requests)) * beams, int(past.sum()))
        return pack_levels(past, drafter.batch.block_table[self._slots[requests]], shape), shape, maximum


class DraftedTrees(KnownTrees):
    """Trees of ``requests`` int64 [A], of a ``batch``, that grow as a device drafts further levels."""

    def __init__(self, requests: np.ndarray, batch: int, log_q: np.ndarray, tokens: np.ndarray):
        """Begin with the roots' children, best first: log-probabilities float32 and tokens int64, both [A, w]."""
        first, count = np.zeros((2, batch), np.int64)
        first[requests], count[requests] = tokens.shape[1] * np.arange(len(requests)), tokens.shape[1]
        none = np.zeros(tokens.size, np.int64)
        super().__init__(tokens.ravel(), log_q.ravel(), none, none, (first, count))
        self._key = ((requests << 32)[:, None] + np.arange(tokens.shape[1])).ravel()  # a request, and a child's number
        self._path = log_q.ravel()

    def add(self, requests: np.ndarray, drafted: np.ndarray) -> None:
        """Add the children that ``Levels.run`` returns for ``requests``; their parents are known, or among them."""
        if not drafted.size:
            return
        number, parent, token = drafted[:, :3].astype(np.int64).swapaxes(0, 1)
        path = np.ascontiguousarray(drafted[:, 3]).view(np.float32).ravel()
        owner = (requests << 32)[:, None]
        key, above = (owner + number).ravel(), (owner + parent).ravel()
        order = np.lexsort((-path, above))
        begin, above = len(self._key), above[order]
        self._key, self._path = np.concatenate((self._key, key[order])), np.concatenate((self._path, path[order]))
        sorter = np.argsort(self._key)
        parents = sorter[np.searchsorted(self._key, above, sorter=sorter)]
        log_q = self._path[begin:] - self._path[parents]
        self._token = np.concatenate((self._token, token.ravel()[order]))
        self._log_q = np.concatenate((self._log_q, log_q))
        starts = np.flatnonzero(np.diff(above, prepend=-1))
        none = np.zeros(len(above), np.int64)
        self._first, self._count = np.concatenate((self._first, none)), np.concatenate((self._count, none))
        self._first[parents[starts]] = begin + starts
        self._count[parents[starts]] = np.diff(starts, append=len(above))
