"""Networks that notice every wrong KV row: a token's row holds a digest of the text up to it, checked in each call.

The target's next token is a function of that digest. An EAGLE-3 head's entry j, token j+1 beside the features of token
j, can therefore know it, and is checked against its neighbours in the same way. Real networks would only write another
text, or be accepted less.
"""

from __future__ import annotations

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.eagle3 import Eagle3Drafter
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from echo_trt.speculation.planner import Planner

VOCAB = 40
DECOYS = 3
START = 1


def digest(before: int, token: int) -> int:
    return (before * 1_000_003 + token * 7919 + 12345) % (2**45 - 55)


def next_token(of: int) -> int:
    return (of >> 7) % VOCAB


def continued(text: list[int], count: int) -> list[int]:
    """Return what the target writes after ``text``."""
    state = START
    for token in text:
        state = digest(state, token)
    new = []
    for _ in range(count):
        new.append(next_token(state))
        state = digest(state, new[-1])
    return new


def as_floats(digests: list[int]) -> np.ndarray:
    """[n] -> float32 [n, 3], exactly."""
    return np.array([[d >> 30, d >> 15 & 0x7FFF, d & 0x7FFF] for d in digests], np.float32).reshape(-1, 3)


def as_digests(floats: np.ndarray) -> list[int]:
    return [int(a) << 30 | int(b) << 15 | int(c) for a, b, c in floats]


class Chained(Engine):
    """The target, or with ``head`` its EAGLE-3 head. A row: its token, the digest before it and the digest with it."""

    def __init__(self, num_blocks: int, head: bool = False):
        self.num_blocks, self.head = num_blocks, head
        self.pool = np.full((num_blocks * BLOCK, 3), -1, np.int64)
        self.tokens_read = 0

    def run(self, call: ForwardBatch, features: np.ndarray | None = None, hidden: np.ndarray | None = None):
        self.tokens_read += len(call.token_ids)
        given = as_digests(features if self.head and len(features) else hidden) if self.head else None
        states: list[int] = []
        for i, past in enumerate(call.past_lens.tolist()):
            begin, end = call.seq_begins[i : i + 2]
            blocks = call.block_indices[call.block_begins[i] : call.block_begins[i + 1]].astype(np.int64)
            rows = (blocks[:, None] * BLOCK + np.arange(BLOCK)).reshape(-1)[: past + end - begin]
            known = self.pool[rows[:past]].tolist()
            last = START
            for position, (token, before, with_it) in enumerate(known):
                assert digest(before, token) == with_it, "a row that nobody wrote"
                assert before == last or (self.head and position == 0), "a row of another text"
                last = with_it
            mask = call.tree_mask[call.tree_mask_begins[i] : call.tree_mask_begins[i + 1]]
            mask = mask.reshape(end - begin, -1) if len(mask) else np.tri(end - begin)
            depth = (call.positions[begin:end] - past).tolist()
            new = []
            for r, token in enumerate(call.token_ids[begin:end].tolist()):
                parents = [j for j in np.flatnonzero(mask[r]).tolist() if depth[j] == depth[r] - 1]
                assert len(parents) == (depth[r] > 0)
                before = new[parents[0]][2] if parents else last
                if self.head:
                    own = given[begin + r]
                    assert own == before or (past == 0 and depth[r] == 0), "features of another text"
                    before = own
                new.append((token, before, digest(before, token)))
            self.pool[rows[past:]] = new
            states += [state for _, _, state in new]
        requested = [states[row] for row in call.logit_rows]
        if not self.head:
            logits = np.zeros((len(requested), VOCAB), np.float32)
            logits[np.arange(len(requested)), [next_token(state) for state in requested]] = 1
            return {"logits": logits, "features": as_floats(states)}
        # The right token stands at a rank that changes, among decoys.
        tokens = np.array(
            [[(next_token(s) + j - s % DECOYS) % VOCAB for j in range(DECOYS)] for s in requested], np.int64
        )
        scores = np.tile(np.log(np.float32([0.5, 0.3, 0.1])), (len(requested), 1))
        return {"scores": scores, "candidates": tokens.reshape(-1, DECOYS), "state": as_floats(states)}

    def compact_kv(self, source: np.ndarray, target: np.ndarray) -> None:
        self.pool[target] = self.pool[source]


def chained_loop(batch: InputBatch, planner: Planner, chunk: int) -> EngineCore:
    target, head = (Chained(batch.blocks.count, head) for head in (False, True))
    return EngineCore(target, Eagle3Drafter(head, batch, chunk, 3, 3), batch, planner, (), chunk)
