"""Padding of passes to few sizes.

A graph is compiled for any size, and a pass of another size than the last one pays for it: shapes are inferred and
kernels prepared again, for the time of five to ten tokens. Trees change size from pass to pass, so their passes are
padded to the next size, and the planner counts the padding as free. A planner that pins a size for a while says so, and
smaller passes are padded to the pinned size. Plain decoding repeats its size and is not padded. A draft that catches up
with a prompt is padded too, since new kernels would take as long as its pass.
"""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.pack import Packed


def pad_requests(call: Packed, size: int, block: int, pad_rows: bool = True) -> Packed:
    """Pad ``call`` to ``size`` tokens with requests of one token, and rows of logits likewise with ``pad_rows``.

    Keys and values of padding go to ``block``, which no other request holds.
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
        logit_rows=np.concatenate((call.logit_rows, np.full(more if pad_rows else 0, size - 1))),
    )
