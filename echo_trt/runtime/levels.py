"""A head's draft whose levels run on the device before the host sees any: they are then read one by one, for free."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.decoding.pack import ROOT, Packed, level_calls
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.runtime.drafters import Eagle3Drafter, EngineDraft

UNKNOWN = -2  # number of a node that was not drafted on the device


class LevelsEngine(Engine, Protocol):
    """An engine of a head that also drafts levels where it computes."""

    def run_levels(
        self, call: Packed, calls: list[Packed], beams: int, width: int, most: int, **inputs: Any
    ) -> np.ndarray:
        """Run ``call``, whose logit rows are the roots', and the levels of ``calls``; see ``draft_levels``."""


class LevelsDrafter(Eagle3Drafter):
    """An EAGLE-3 head whose engine drafts several levels without a return to the host."""

    engine: LevelsEngine
    looks_ahead = True  # read by TimedDraft

    def begin(self, slots: np.ndarray) -> LevelsDraft:
        return LevelsDraft(self, slots)

    def draft_ahead(self, slots: np.ndarray, calls: list[Packed], shape: tuple[int, int, int]) -> np.ndarray:
        """Catch up and draft the levels of ``calls``: int32 [4, A, most], as ``draft_levels`` returns them.

        shape: beams, width and most
        """

        def run(slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
            call, inputs = self._packed(slots, start, counts, np.cumsum(counts) - 1)
            return {"drafted": self.engine.run_levels(call, calls, *shape, **inputs)}

        drafted: np.ndarray = self.catch_up(slots, run)[0]["drafted"]
        return drafted


class LevelsDraft(EngineDraft):
    """One iteration of a head on a device: level by level, or several levels at once where the planner asks for it."""

    _drafter: LevelsDrafter
    _trees: DraftedTrees | None = None
    _levels, passes = 0, 1

    def look_ahead(self, levels: int, beams: int, width: int, most: int) -> None:
        self._levels, self._beams, self._width, self._most = levels, min(beams, width), width, most

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self._levels:
            return super().expand_roots(requests)
        drafter, slots, past = self._drafter, self._slots[requests], self._past[requests]
        behind = int(drafter.behind(slots).sum())
        calls = level_calls(past, drafter.state.block_table[slots], self._levels, self._beams)
        self.entries = (behind + sum(len(call.token_ids) for call in calls)) // (1 + self._levels)  # of a pass
        self.context, self.passes = int(past.sum()), 1 + self._levels
        self._trees = DraftedTrees(drafter.draft_ahead(slots, calls, (self._beams, self._width, self._most)), requests)
        return self._trees.of_roots()

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._trees is None:
            return super().expand(tree, nodes)
        self.entries, self.context, self.passes = 0, 0, 1
        return self._trees.children(tree, nodes)


class DraftedTrees:
    """The trees of A requests as ``backends.cuda.levels.draft_levels`` returns them, read level by level."""

    def __init__(self, drafted: np.ndarray, requests: np.ndarray):
        """``drafted`` int32 [4, A, M]; ``requests`` int64 [A], of the batch, ascending."""
        number, parent, token = drafted[:3].astype(np.int64)
        score = drafted[3].view(np.float32)
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
