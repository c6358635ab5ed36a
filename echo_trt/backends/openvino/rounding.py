"""Passes of few sizes.

Where a graph is compiled for any size, a pass of another size than the last one pays for it: shapes are inferred and
kernels are prepared again, which takes as long as five to ten tokens more. Trees change size from pass to pass, so
their passes are padded to the next size of a ladder, and the planner knows that the tokens up to there cost nothing.
Where it keeps to one size for a while, it says so, and passes that are short of it are padded to that. Plain decoding
repeats its size and is left as it is. A draft that catches up with a prompt has a size of its own nearly each time,
whose kernels are new: that takes as long as its pass does.
"""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.pack import Packed


def padded(call: Packed, size: int, block: int, rows_too: bool = True) -> Packed:
    """``call`` with requests of one token that nobody reads, up to ``size`` tokens, and as many rows asked for.

    Their keys and values go to ``block``, which no other request holds. Without ``rows_too`` no rows are added.
    """
    count = len(call.token_ids)
    more = size - count
    if more <= 0:
        return call
    zeros = np.zeros(more, np.int32)
    follow = np.arange(1, more + 1, dtype=np.int32)
    return call._replace(
        token_ids=np.concatenate((call.token_ids, zeros)),
        positions=np.concatenate((call.positions, zeros)),
        past_lens=np.concatenate((call.past_lens, zeros)),
        seq_begins=np.concatenate((call.seq_begins, count + follow)),
        block_indices=np.concatenate((call.block_indices, zeros + np.int32(block))),
        block_begins=np.concatenate((call.block_begins, call.block_begins[-1] + follow)),
        tree_mask_begins=np.concatenate((call.tree_mask_begins, zeros + call.tree_mask_begins[-1])),
        logit_rows=np.concatenate((call.logit_rows, np.full(more if rows_too else 0, size - 1))),
    )


def is_verification(call: Packed) -> bool:
    """Whether some request brings a tree, or a chain with a mask."""
    return len(call.tree_mask) > 0
