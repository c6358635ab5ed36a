"""A chain of tokens as sequences of one token each, over the same KV blocks.

OpenVINO's attention has one kernel for a single token of a request and another for several. Their low-precision results
differ, so that a verified chain would not have plain decoding's logits bit by bit, and a call that needs both pays for
both. All new rows are written before any is attended, so token j of a chain can be a sequence of its own, whose past is
j longer: the same attention, by the kernel that plain decoding uses.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from echo_trt.decoding.pack import BLOCK, Packed
from echo_trt.decoding.ragged import begins, ragged_arange

LONGEST = 32  # a prompt chunk is better off in the kernel for many tokens


def as_lanes(call: Packed) -> Packed:
    """``call`` with every chain of 2 to LONGEST tokens as that many requests; trees and longer chunks as they are."""
    counts = np.diff(call.seq_begins)
    chain = (counts > 1) & (counts <= LONGEST) & _causal(call, counts)
    if not chain.any():
        return call
    lanes = np.where(chain, counts, 1)
    request = np.repeat(np.arange(len(counts)), lanes)
    past = call.past_lens[request] + ragged_arange(lanes)
    tokens = np.where(chain, 1, counts)[request]
    used = -(-(past + tokens) // BLOCK)
    areas = np.where(chain, 0, np.diff(call.tree_mask_begins))
    return dataclasses.replace(
        call,
        past_lens=past.astype(np.int32),
        seq_begins=begins(tokens).astype(np.int32),
        block_indices=call.block_indices[np.repeat(call.block_begins[request], used) + ragged_arange(used)],
        block_begins=begins(used).astype(np.int32),
        tree_mask=call.tree_mask[np.repeat(call.tree_mask_begins[:-1], areas) + ragged_arange(areas)],
        tree_mask_begins=begins(areas[request]).astype(np.int32),
    )


def _causal(call: Packed, counts: np.ndarray) -> np.ndarray:
    """Whether each request's mask [B] lets every token see all before it; an empty one does."""
    seen = np.concatenate(([0], np.cumsum(call.tree_mask, dtype=np.int64)))[call.tree_mask_begins]
    areas = np.diff(call.tree_mask_begins)
    return (areas == 0) | (np.diff(seen) == counts * (counts + 1) // 2)
