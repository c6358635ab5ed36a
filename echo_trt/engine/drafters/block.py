"""Block drafters: one pass per iteration gives the distributions of all depths, and further levels cost nothing.

The context's keys and values come from the target's features of committed tokens and are cached in the draft's KV pool.
The block's rows follow the context: the next pass overwrites them, since the cached length does not count them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.bundle.manifest import CONFIDENCE, BlockFacts, Manifest
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import NONE, Eagle3Drafter
from echo_trt.errors import DAMAGED, UserError
from echo_trt.speculation.arrays import ragged_arange
from echo_trt.speculation.drafts import UNKNOWN, KnownTrees, Proposals, TimedDraft
from echo_trt.speculation.pack import BlockShape, pack_blocks
from echo_trt.speculation.super_tree import SuperTree

MIN_SHARE = 1e-6  # smallest share of the best candidate and of the others, which is a divisor


class BlockDrafter(Eagle3Drafter):
    """A block drafter: entry j is the target's features of token j, and for P-EAGLE token j+1 as well."""

    def __init__(
        self,
        engine: Engine,
        batch: InputBatch,
        chunk: int,
        feature_size: int,
        facts: BlockFacts,
        confidence: np.ndarray | None = None,
    ):
        """``confidence``: float32 [V], what the previous token adds to the logit of the confidence head, if any."""
        self.shape = BlockShape(facts.rows, facts.mask_token, facts.both_ways, facts.anchored)
        # A request's context and block go into one call, which is bounded by the chunk or the reserve.
        super().__init__(engine, batch, max(chunk, batch.reserve) - self.shape.appended, feature_size, 0)
        self.block = self.shape.rows - self.shape.anchored  # beside the entries that were missing
        #: The row that proposes the children of roots: rows predict their own position, or the next one.
        self.first = 0 if facts.predicts_next else 1
        self.confidence = confidence

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
        call, states = pack_blocks(self.shape, tokens, start, counts, roots, batch.blocks.table[slots])
        return self.engine.run(call, features=inputs["features"], state_rows=states)


class BlockDraft(TimedDraft):
    """One iteration of a BlockDrafter: its pass comes with the roots, and children are then read from its rows."""

    def __init__(self, drafter: BlockDrafter, slots: np.ndarray):
        super().__init__()
        self._drafter, self._slots = drafter, slots

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        drafter, slots = self._drafter, self._slots[requests]
        batch, count = drafter.batch, len(requests)
        entries = int(drafter.draft_lag(slots).sum()) + drafter.block * count
        self.ran(entries, int(batch.committed[slots].sum()))
        outputs, _ = drafter.prefill_draft(slots)
        self._trees = BlockTrees(outputs, requests, len(self._slots), drafter.shape.rows, drafter.first)
        roots, first = batch.tokens[slots, batch.committed[slots]], np.zeros(count, np.int64)
        return self._confided(self._trees.expand_roots(requests), self._trees.row_of(requests, first), roots)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        rows = self._trees.row_of(tree.request[nodes], tree.depth[nodes])
        return self._confided(self._trees.expand(tree, nodes), rows, tree.token[nodes])

    def _confided(self, proposals: Proposals, rows: np.ndarray, tokens: np.ndarray) -> Proposals:
        """Give the best candidate of ``rows`` [F] the confidence head's probability, if the drafter has one.

        The other candidates share the rest as they stand. ``tokens`` [F]: those before the rows' candidates
        """
        by_token = self._drafter.confidence
        if by_token is None:
            return proposals
        log_q, candidates = proposals
        logit = self._trees.confidence[rows] + by_token[tokens]
        best = np.clip(0.5 * (1 + np.tanh(0.5 * logit)), MIN_SHARE, 1 - MIN_SHARE)  # a sigmoid that overflows nowhere
        others = np.log((1 - best) / np.maximum(1 - np.exp(log_q[:, 0]), MIN_SHARE))
        confided = log_q + others[:, None]
        confided[:, 0] = np.log(best)
        return np.where(log_q[:, :1] > -np.inf, confided, np.float32(-np.inf)), candidates


class BlockTrees(KnownTrees):
    """The trees of a block's rows: below any node of a depth stand the candidates of the same row.

    confidence  float32 [A * rows], what a row's hidden state says to the confidence head
    """

    def __init__(self, outputs: dict[str, np.ndarray], requests: np.ndarray, batch: int, rows: int, first: int):
        """``first``: the row whose candidates stand below roots."""
        scores, count = np.array(outputs["scores"]), len(requests)
        width = scores.shape[1]
        self.confidence = np.array(outputs.get("confidence", np.zeros(0, np.float32))).ravel()
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


def read_confidence(folder: Path, manifest: Manifest) -> np.ndarray | None:
    """Return what each token adds to the confidence of the bundle's block drafter: float32 [V]; None: no head."""
    if manifest.draft is None or manifest.draft.block is None or not manifest.draft.block.confidence:
        return None
    path = folder / CONFIDENCE
    try:
        by_token: np.ndarray = np.load(path, allow_pickle=False)
    except DAMAGED as error:
        raise UserError(f"{path} does not hold the confidence by token; build the bundle again.") from error
    if by_token.shape != (manifest.target.vocab_size,):
        raise UserError(f"{path} has {by_token.size} tokens, not the target's; build the bundle again.")
    return by_token
