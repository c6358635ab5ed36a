"""Block drafters: one pass per iteration gives the distributions of all depths, and further levels cost nothing.

The context's keys and values come from the target's features of committed tokens and are cached in the draft's KV pool.
The block's rows follow the context: the next pass overwrites them, since the cached length does not count them.
"""

from __future__ import annotations

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.bundle.manifest import BlockFacts
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import NONE, Eagle3Drafter
from echo_trt.engine.drafters.markov import Markov
from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.drafts import UNKNOWN, KnownTrees, Proposals, TimedDraft
from echo_trt.speculation.pack import BlockShape, pack_blocks
from echo_trt.speculation.super_tree import SuperTree


class BlockDrafter(Eagle3Drafter):
    """A block drafter: entry j is the target's features of token j, and for P-EAGLE token j+1 as well."""

    def __init__(
        self,
        engine: Engine,
        batch: InputBatch,
        chunk: int,
        feature_size: int,
        facts: BlockFacts,
        markov: Markov | None = None,
    ):
        """``markov`` corrects proposals, where the drafter has such heads."""
        self.shape = BlockShape(facts.rows, facts.mask_token, facts.both_ways, facts.anchored)
        # A request's context and block go into one call, which is bounded by the chunk or the reserve.
        super().__init__(engine, batch, max(chunk, batch.reserve) - self.shape.appended, feature_size, 0)
        self.block = self.shape.rows - self.shape.anchored  # beside the entries that were missing
        #: The row that proposes the children of roots: rows predict their own position, or the next one.
        self.first = 0 if facts.predicts_next else 1
        self.markov = markov

    def begin(self, slots: np.ndarray) -> BlockDraft:
        return BlockDraft(self, slots)

    def dummy_inputs(self, entries: int) -> dict[str, np.ndarray]:
        return {"features": self._features.read(NONE), "state_rows": np.arange(entries)}

    def entries(self, slots: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens, inputs = super().entries(slots, index)
        return tokens, {"features": inputs["features"], "state_rows": np.arange(len(slots))}

    def _run_newest(self, slots: np.ndarray, start: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Run the missing entries and a block behind them; the outputs are of the blocks' rows."""
        batch = self.batch
        owner, index = np.repeat(slots, counts), np.repeat(start, counts) + ragged_arange(counts)
        tokens, inputs = self.entries(owner, index)
        roots = batch.tokens[slots, batch.committed[slots]]
        call, states = pack_blocks(self.shape, tokens, start, counts, roots, batch.block_table[slots])
        return self.engine.run(call, features=inputs["features"], state_rows=states)


class BlockDraft(TimedDraft):
    """One iteration of a BlockDrafter: its pass comes with the roots, and children are then read from its rows."""

    def __init__(self, drafter: BlockDrafter, slots: np.ndarray):
        super().__init__()
        self._drafter, self._slots = drafter, slots
        self._states: dict[int, np.ndarray] = {}  # of a recurrent Markov head, by expanded node

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        drafter, slots = self._drafter, self._slots[requests]
        batch, count = drafter.batch, len(requests)
        entries = int(drafter.draft_lag(slots).sum()) + drafter.block * count
        self.ran(entries, int(batch.committed[slots].sum()))
        outputs, _ = drafter.prefill_draft(slots)
        self._trees = BlockTrees(outputs, requests, len(self._slots), drafter.shape.rows, drafter.first)
        roots = batch.tokens[slots, batch.committed[slots]].astype(np.int64)
        rows = self._trees.row_of(requests, np.zeros(count, np.int64))
        return self._corrected(self._trees.expand_roots(requests), rows, roots, requests, np.full(count, -1))

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        proposals, rows = self._trees.expand(tree, nodes), self._trees.row_of(tree.request[nodes], tree.depth[nodes])
        return self._corrected(proposals, rows, tree.token[nodes], nodes, tree.parent[nodes])

    def _corrected(
        self, proposals: Proposals, rows: np.ndarray, tokens: np.ndarray, nodes: np.ndarray, parents: np.ndarray
    ) -> Proposals:
        """Correct the proposals below ``nodes`` [F], which have ``tokens``, by the Markov head, if there is one."""
        markov = self._drafter.markov
        if markov is None:
            return proposals
        log_q, candidates = proposals
        exists, none = log_q > -np.inf, np.zeros(markov.state_size, np.float32)
        states = np.array([self._states.get(parent, none) for parent in parents.tolist()])
        states = states.reshape(len(parents), markov.state_size)
        log_q, candidates, states = markov.correct(log_q, candidates, self._trees.hidden_states[rows], tokens, states)
        if markov.state_size:
            self._states.update(zip(nodes.tolist(), states, strict=True))
        return np.where(exists.any(axis=1, keepdims=True), log_q, np.float32(-np.inf)), candidates


class BlockTrees(KnownTrees):
    """The trees of a block's rows: below any node of a depth stand the candidates of the same row.

    hidden_states  float32 [A * rows, G], what a row's hidden state says to a Markov head
    """

    def __init__(self, outputs: dict[str, np.ndarray], requests: np.ndarray, batch: int, rows: int, first: int):
        """``first``: the row whose candidates stand below roots."""
        scores, count = np.array(outputs["scores"]), len(requests)
        width = scores.shape[1]
        self.hidden_states = np.asarray(outputs.get("hints", np.zeros((count * rows, 0), np.float32)))
        self._rows, self._first_row, self._width = rows, first, width
        self._index = np.zeros(batch, np.int64)  # a request's block in the pass
        self._index[requests] = np.arange(count)
        row = np.repeat(np.arange(count * rows), width)
        children = np.where((row + 1) % rows, width, 0)
        roots = (self._index * rows + first) * width, np.full(batch, width)
        super().__init__(np.array(outputs["candidates"]).ravel(), scores.ravel(), (row + 1) * width, children, roots)

    def row_of(self, requests: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """Return the row below nodes at ``depth`` int64 [F], or the block's last one: int64 [F]."""
        row: np.ndarray = self._index[requests] * self._rows + np.minimum(self._first_row + depth, self._rows - 1)
        return row

    def _find(self, tree: SuperTree, nodes: np.ndarray) -> np.ndarray:
        """Find any node of the same row: whatever its token, its children are the next row's."""
        row = self._first_row + tree.depth[nodes] - 1
        entry = (self._index[tree.request[nodes]] * self._rows + row) * self._width
        return np.where(row < self._rows, entry, UNKNOWN)
