"""A head's draft whose levels run on the device before the host sees any: they are then read one by one, for free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from echo_trt.engine.drafters.eagle3 import Eagle3Drafter, EngineDraft
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.drafts import KnownTrees, Proposals
from echo_trt.speculation.pack import ForwardBatch, LevelShape, pack_levels
from echo_trt.speculation.super_tree import SuperTree

if TYPE_CHECKING:
    from echo_trt.backends.cuda.engine import DeviceEngine


class Ahead(NamedTuple):
    """What ``Draft.look_ahead`` was told, and which has not run yet."""

    depth: int
    beams: int
    width: int
    maximum: int


class DeviceWork(NamedTuple):
    """What a device computes before the host waits for it: ``tokens`` of its passes in order, padding included.

    launches  CUDA graphs: one for the pass over committed tokens, and one for all levels
    """

    tokens: tuple[int, ...]
    launches: int


def device_work(
    requests: int, shape: LevelShape, padded: Callable[[int], int], lag: int = 0, sizes: Sequence[int] = ()
) -> DeviceWork:
    """Count what a device computes for the levels of ``shape``.

    padded  returns the requests to which a level is padded
    lag     committed tokens that the draft computes before, in a pass padded to one of ``sizes``; 0: no such pass
    """
    caught_up = (next_size(sizes, lag),) if lag else ()
    levels = (padded(requests) * shape.beams,) * shape.levels
    return DeviceWork(caught_up + levels, bool(caught_up) + bool(levels))


class LevelsDrafter(Eagle3Drafter):
    """An EAGLE-3 head whose engine drafts several levels without a return to the host."""

    engine: DeviceEngine

    def begin(self, slots: np.ndarray) -> LevelsDraft:
        return LevelsDraft(self, slots)

    def start_levels(
        self, slots: np.ndarray, below: ForwardBatch, shape: LevelShape, max_nodes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Catch up and draft the levels of ``below``; see ``DeviceEngine.start_levels``."""

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
        width, (below, shape, maximum) = self._ahead.width, self._next_levels(requests, lag)
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

    def _next_levels(self, requests: np.ndarray, lag: int = 0) -> tuple[ForwardBatch, LevelShape, int]:
        """Return the call and the shape of the levels that ``look_ahead`` asked for, and the nodes to return."""
        assert self._ahead is not None
        drafter, (depth, beams, width, maximum) = self._drafter, self._ahead
        shape = LevelShape(self._depth, depth - self._depth, beams, width)
        self._ahead, self._depth, self._running = None, depth, requests
        past, engine = self._past[requests], drafter.engine
        for tokens in device_work(len(requests), shape, engine.padded_requests, lag, engine.sizes).tokens:
            self.ran(tokens, int(past.sum()))
        return pack_levels(past, drafter.batch.blocks.table[self._slots[requests]], shape), shape, maximum


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
