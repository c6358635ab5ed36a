"""A head's draft whose levels run on the device before the host sees any: they are then read one by one, for free."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.decoding.pack import ROOT, LevelShape, Packed, pack_levels
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.runtime.drafters import Eagle3Drafter, EngineDraft

UNKNOWN = -2  # number of a node that was not drafted on the device


class LevelsEngine(Engine, Protocol):
    """An engine of a head that also drafts levels where it computes."""

    def run_levels(self, call: Packed, below: Packed, shape: LevelShape, most: int, **inputs: Any) -> np.ndarray:
        """Run ``call``, whose logit rows are the roots', and the levels of ``below``; see ``Levels.run``."""


class LevelsDrafter(Eagle3Drafter):
    """An EAGLE-3 head whose engine drafts several levels without a return to the host."""

    engine: LevelsEngine
    looks_ahead = True  # read by TimedDraft

    def begin(self, slots: np.ndarray) -> LevelsDraft:
        return LevelsDraft(self, slots)

    def draft_ahead(self, slots: np.ndarray, below: Packed, shape: LevelShape, most: int) -> np.ndarray:
        """Catch up and draft the levels of ``below``: int32 [A, 4, most], as ``Levels.run`` returns them."""

        def run(slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
            call, inputs = self._packed(slots, start, counts, np.cumsum(counts) - 1)
            return {"drafted": self.engine.run_levels(call, below, shape, most, **inputs)}

        drafted: np.ndarray = self.catch_up(slots, run)[0]["drafted"]
        return drafted


class LevelsDraft(EngineDraft):
    """One iteration of a head on a device: level by level, or several levels at once where the planner asks for it."""

    _drafter: LevelsDrafter
    _trees: DraftedTrees | None = None
    _shape: LevelShape | None = None
    _most, passes = 0, 1

    def look_ahead(self, levels: int, beams: int, width: int, most: int) -> None:
        self._shape, self._most = LevelShape(levels, min(beams, width), width), most

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self._shape:
            return super().expand_roots(requests)
        drafter, shape, slots, past = self._drafter, self._shape, self._slots[requests], self._past[requests]
        below = pack_levels(past, drafter.state.block_table[slots], shape)
        rows = len(requests) * shape.beams * shape.levels * (shape.levels + 1) // 2
        self.passes = 1 + shape.levels
        self.entries = (int(drafter.behind(slots).sum()) + rows) // self.passes  # of a pass
        self.context = int(past.sum())
        self._trees = DraftedTrees(drafter.draft_ahead(slots, below, shape, self._most), requests)
        return self._trees.of_roots()

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._trees is None:
            return super().expand(tree, nodes)
        self.entries, self.context, self.passes = 0, 0, 1
        return self._trees.children(tree, nodes)


class DraftedTrees:
    """The trees of A requests as ``backends.cuda.levels.Levels`` returns them, read level by level."""

    def __init__(self, drafted: np.ndarray, requests: np.ndarray):
        """``drafted`` int32 [A, 4, M]; ``requests`` int64 [A], of the batch, ascending."""
        number, parent, token = drafted[:, :3].astype(np.int64).swapaxes(0, 1)
        score = np.ascontiguousarray(drafted[:, 3]).view(np.float32)
        owner = np.repeat(np.arange(len(requests)), number.shape[1])
        order = np.lexsort((-score.reshape(-1), parent.reshape(-1), owner))
        self._owner, self._number = owner[order], number.reshape(-1)[order]
        self._token, self._score = token.reshape(-1)[order], score.reshape(-1)[order]
        self._parent = parent.reshape(-1)[order]
        self._family = self._owner * (1 << 32) + self._parent + 2  # ascending
        self._requests = requests
        self._number_of = np.full(int(requests.max(initial=-1)) + 1, ROOT)  # of a tree's nodes; roots come first
        self._score_of = np.zeros(len(self._number_of))

    def children(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log q [F, w], best first, and tokens int64 [F, w] of the children of ``nodes`` int64 [F]."""
        self._find(tree, nodes)
        owner = np.searchsorted(self._requests, tree.request[nodes])
        return self._of_family(owner, self._number_of[nodes], self._score_of[nodes])

    def of_roots(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of all roots, [A, w]."""
        count = len(self._requests)
        return self._of_family(np.arange(count), np.full(count, ROOT), np.zeros(count))

    def _of_family(self, owner: np.ndarray, number: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        family = owner * (1 << 32) + number + 2
        begin, end = np.searchsorted(self._family, family), np.searchsorted(self._family, family, side="right")
        end = np.where(number == UNKNOWN, begin, end)
        width = max(int((end - begin).max(initial=0)), 1)
        place = begin[:, None] + np.arange(width)
        there = place < end[:, None]
        place = np.minimum(place, max(len(self._family) - 1, 0))
        log_q = np.where(there, self._score[place] - above[:, None], -np.inf).astype(np.float32)
        return log_q, np.where(there, self._token[place], 0)

    def _find(self, tree: SuperTree, nodes: np.ndarray) -> None:
        """Find the numbers of ``nodes``, whose parents' are known, by their tokens."""
        missing = len(tree) - len(self._number_of)
        if missing > 0:
            self._number_of = np.concatenate((self._number_of, np.full(missing, UNKNOWN)))
            self._score_of = np.concatenate((self._score_of, np.zeros(missing)))
        owner = np.searchsorted(self._requests, tree.request[nodes])
        family = owner * (1 << 32) + self._number_of[tree.parent[nodes]] + 2
        begin, end = np.searchsorted(self._family, family), np.searchsorted(self._family, family, side="right")
        width = max(int((end - begin).max(initial=0)), 1)
        place = np.minimum(begin[:, None] + np.arange(width), len(self._family) - 1)
        same = (self._token[place] == tree.token[nodes][:, None]) & (np.arange(width) < (end - begin)[:, None])
        found = place[np.arange(len(nodes)), same.argmax(axis=1)]
        known = same.any(axis=1) & (self._number_of[tree.parent[nodes]] != UNKNOWN)
        self._number_of[nodes] = np.where(known, self._number[found], UNKNOWN)
        self._score_of[nodes] = np.where(known, self._score[found], 0.0)
