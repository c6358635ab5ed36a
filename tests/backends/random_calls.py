"""Random packed calls, and what networks read beside their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pairs import VOCAB, block_inputs

from echo_trt.models.roles import BlockModule, HeadModule, Role, feature_size
from echo_trt.speculation.pack import ForwardBatch, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask


class Script:
    """Random calls over requests whose texts grow; each has a row of ``table``. ``tree`` is the newest call's."""

    def __init__(self, seed: int, table: np.ndarray, vocab: int = VOCAB):
        self.rng, self.table, self.vocab = np.random.default_rng(seed), table, vocab
        self.past = np.zeros(len(table), np.int64)

    def call(
        self, slots: np.ndarray, planted: int = 0, chunks: Sequence[int] = (), grown: int = 0, share: float = 0.6
    ) -> ForwardBatch:
        """Pack a tree for each of the first ``planted`` of ``slots``, and for the others more tokens of their texts.

        chunks  [len(slots) - planted], those tokens, which are committed
        grown   nodes that are added to the trees
        share   of the rows whose logits are asked for
        """
        tree = SuperTree.from_roots(self._tokens(planted))
        for _ in range(grown if planted else 0):
            tree.add(self.rng.integers(0, len(tree), 1), self._tokens(1), np.zeros(1))
        self.tree, _ = tree.sorted_by_request(np.arange(len(tree)))
        tree, chunks = self.tree, np.asarray(chunks, np.int64)
        owner, indices = np.repeat(slots[planted:], chunks), np.concatenate([np.arange(n) for n in (0, *chunks)])
        tokens = np.concatenate((tree.token, self._tokens(len(owner))))
        positions = np.concatenate((self.past[slots[tree.request]] + tree.depth, self.past[owner] + indices))
        requested, counts = np.flatnonzero(self.rng.random(len(tokens)) < share), np.concatenate((tree.sizes, chunks))
        mask = ancestor_mask(tree) if planted else None
        call = pack(tokens, positions, self.past[slots], counts, self.table[slots], requested, mask)
        self.past[slots[planted:]] += chunks
        return call

    def _tokens(self, count: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab, count)


def inputs_for(role: Role, call: ForwardBatch, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a head's features of the first entries and states of the others; a block drafter's features and states."""
    config, count = role.network.config, len(call.token_ids)
    if isinstance(role, BlockModule):
        return block_inputs(call, feature_size(role), rng)
    if not isinstance(role, HeadModule):
        return {}
    known = int(rng.choice([0, count, rng.integers(0, count + 1)]))
    features = rng.standard_normal((known, feature_size(role)), np.float32)
    return {"features": features, "hidden": rng.standard_normal((count - known, config.hidden_size), np.float32)}
