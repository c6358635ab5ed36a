"""A head's draft whose levels run on the device before the host sees any: they are then read one by one, for free."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.engine.drafters.eagle3 import Eagle3Drafter, EngineDraft
from echo_trt.speculation.drafts import KnownTrees, Proposals
from echo_trt.speculation.pack import ROOT, ForwardBatch, LevelShape, pack_levels
from echo_trt.speculation.super_tree import SuperTree


class LevelsEngine(Engine, Protocol):
    """An engine of a head that also drafts levels where it computes."""

    def run_levels(
        self,
        call: ForwardBatch,
        below: ForwardBatch,
        shape: LevelShape,
        max_nodes: int,
        keys: np.ndarray | None = None,
        **inputs: Any,
    ) -> np.ndarray:
        """Run ``call``, whose logit rows are the roots', and the levels of ``below``; see ``Levels.run``."""


class LevelsDrafter(Eagle3Drafter):
    """An EAGLE-3 head whose engine drafts several levels without a return to the host."""

    engine: LevelsEngine

    def begin(self, slots: np.ndarray) -> LevelsDraft:
        return LevelsDraft(self, slots)

    def draft_ahead(self, slots: np.ndarray, below: ForwardBatch, shape: LevelShape, max_nodes: int) -> np.ndarray:
        """Catch up and draft the levels of ``below``: int32 [A, 4, most], as ``Levels.run`` returns them."""

        def run(slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
            call, inputs = self._packed(slots, start, counts, np.cumsum(counts) - 1)
            keys = self.batch.text_key[slots]
            return {"drafted": self.engine.run_levels(call, below, shape, max_nodes, keys, **inputs)}

        drafted: np.ndarray = self.prefill_draft(slots, run)[0]["drafted"]
        return drafted


class LevelsDraft(EngineDraft):
    """One iteration of a head on a device: level by level, or several levels at once where the planner asks for it."""

    _drafter: LevelsDrafter
    _trees: KnownTrees | None = None
    _shape: LevelShape | None = None
    _max_nodes = 0
    looks_ahead = True

    def look_ahead(self, levels: int, beams: int, width: int, max_nodes: int) -> None:
        self._shape, self._max_nodes = LevelShape(levels, min(beams, width), width), max_nodes

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        if not self._shape:
            return super().propose_roots(requests)
        drafter, shape, slots, past = self._drafter, self._shape, self._slots[requests], self._past[requests]
        below = pack_levels(past, drafter.batch.block_table[slots], shape)
        rows = len(requests) * shape.beams * shape.levels * (shape.levels + 1) // 2
        passes = 1 + shape.levels
        self.ran((int(drafter.draft_lag(slots).sum()) + rows) // passes, int(past.sum()), passes)
        drafted = drafter.draft_ahead(slots, below, shape, self._max_nodes)
        self._trees = drafted_trees(drafted, requests, len(self._slots))
        return self._trees.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        return self._trees.expand(tree, nodes) if self._trees else super().propose(tree, nodes)


def drafted_trees(drafted: np.ndarray, requests: np.ndarray, batch: int) -> KnownTrees:
    """Read the trees of ``requests`` int64 [A], of a ``batch``, that ``Levels.run`` returns: int32 [A, 4, M]."""
    number, parent, token = drafted[:, :3].astype(np.int64).swapaxes(0, 1)
    score = np.ascontiguousarray(drafted[:, 3]).view(np.float32).ravel()
    owner = np.arange(len(requests))[:, None] << 32
    itself, above = (owner + number - ROOT).ravel(), (owner + parent - ROOT).ravel()  # a root is its owner's first
    order = np.lexsort((-score, above))
    itself, above, token, score = itself[order], above[order], token.ravel()[order], score[order]

    def families(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = np.searchsorted(above, of)
        return first, np.searchsorted(above, of, side="right") - first

    known, path = np.append(itself, owner.ravel()), np.append(score, np.zeros(len(requests), np.float32))
    sorter = np.argsort(known)
    path_above = path[sorter[np.searchsorted(known, above, sorter=sorter)]]
    roots = np.zeros((2, batch), np.int64)
    roots[:, requests] = families(owner.ravel())
    return KnownTrees(token, score - path_above, *families(itself), (roots[0], roots[1]))
