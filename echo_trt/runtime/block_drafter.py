"""Block drafters: one pass an iteration gives the distributions of all depths, and further levels cost nothing.

The context's keys and values come from the target's features of committed tokens and are cached in the draft's KV pool.
The block's rows stand behind them: they are written again in the next pass, and forgotten by length.
"""

from __future__ import annotations

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.bundle.manifest import BlockFacts
from echo_trt.decoding.arrays import ragged_arange
from echo_trt.decoding.pack import BlockShape, pack_blocks
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.runtime.drafters import NONE, Eagle3Drafter
from echo_trt.runtime.markov import Markov
from echo_trt.runtime.slots import Slots


class BlockDrafter(Eagle3Drafter):
    """A block drafter: entry j is the target's features of token j, and for P-EAGLE token j+1 as well."""

    def __init__(
        self,
        engine: Engine,
        state: Slots,
        chunk: int,
        feature_size: int,
        facts: BlockFacts,
        markov: Markov | None = None,
    ):
        """``markov`` corrects proposals, where the drafter has such heads."""
        self.shape = BlockShape(facts.rows, facts.mask_token, facts.both_ways, facts.anchored)
        # A request's context and block go into one call, which is bounded by the chunk or the reserve.
        super().__init__(engine, state, max(chunk, state.reserve) - self.shape.appended, feature_size, 0)
        #: The row that proposes the children of roots: rows predict their own position, or the next one.
        self.first = 0 if facts.predicts_next else 1
        self.markov = markov

    @property
    def block(self) -> int:
        """Rows that a request's pass computes beside the entries that it catches up with."""
        return self.shape.rows - self.shape.anchored

    def begin(self, slots: np.ndarray) -> BlockDraft:
        return BlockDraft(self, slots)

    def blank(self, entries: int) -> dict[str, np.ndarray]:
        return {"features": self._features.read(NONE), "state_rows": np.arange(entries)}

    def entries(self, slots: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens, inputs = super().entries(slots, index)
        return tokens, {"features": inputs["features"], "state_rows": np.arange(len(slots))}

    def _run_newest(self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Run the missing entries and a block behind them; the outputs are of the blocks' rows."""
        state = self.state
        owner, index = np.repeat(slots, counts), np.repeat(start, counts) + ragged_arange(counts)
        tokens, inputs = self.entries(owner, index)
        roots = state.tokens[slots, state.committed[slots]]
        call, states = pack_blocks(self.shape, tokens, start, counts, roots, state.block_table[slots])
        return self.engine.run(call, features=inputs["features"], state_rows=states)


class BlockDraft:
    """One iteration of a BlockDrafter: its pass comes with the roots, and children are then read from its rows."""

    def __init__(self, drafter: BlockDrafter, slots: np.ndarray):
        self._drafter, self._slots = drafter, slots
        self.entries = self.context = 0
        self._place = np.zeros(len(slots), np.int64)  # of a request's block among those of the pass
        self._states: dict[int, np.ndarray] = {}  # of a recurrent Markov head, by expanded node

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        drafter, slots = self._drafter, self._slots[requests]
        state, rows, count = drafter.state, drafter.shape.rows, len(requests)
        self.entries = int(drafter.behind(slots).sum()) + drafter.block * count
        self.context = int(state.committed[slots].sum())
        outputs, _ = drafter.catch_up(slots)
        self._place[requests] = np.arange(count)
        self._scores = np.array(outputs["scores"]).reshape(count, rows, -1)
        self._candidates = np.array(outputs["candidates"]).reshape(count, rows, -1)
        self._hints = np.asarray(outputs.get("hints", np.zeros((count * rows, 0), np.float32))).reshape(count, rows, -1)
        none = np.zeros(count, np.int64)
        roots = state.tokens[slots, state.committed[slots]].astype(np.int64)
        return self._children(requests, none, roots, requests, none - 1)

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.entries = self.context = 0
        return self._children(tree.request[nodes], tree.depth[nodes], tree.token[nodes], nodes, tree.parent[nodes])

    def _children(
        self, requests: np.ndarray, depth: np.ndarray, tokens: np.ndarray, nodes: np.ndarray, parents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Propose children of ``nodes`` [F], which have ``tokens``; below the block's last row there are none."""
        drafter = self._drafter
        row = depth + drafter.first
        inside = row < drafter.shape.rows
        place = self._place[requests], np.minimum(row, drafter.shape.rows - 1)
        log_q, candidates = self._scores[place], self._candidates[place]
        if drafter.markov is not None:
            size = drafter.markov.state_size
            states = np.array([self._states.get(parent, np.zeros(size, np.float32)) for parent in parents.tolist()])
            states = states.reshape(len(parents), size)
            log_q, candidates, states = drafter.markov.correct(log_q, candidates, self._hints[place], tokens, states)
            if size:
                self._states.update(zip(nodes.tolist(), states, strict=True))
        log_q[~inside] = -np.inf
        return log_q, candidates
