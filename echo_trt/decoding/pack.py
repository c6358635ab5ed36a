"""Flatten and pack: a ragged batch of prompt chunks, single tokens and trees as one engine call, without padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from echo_trt.decoding.arrays import compiled

BLOCK = 32  # tokens in a KV block
_CAUSAL = np.zeros(0, np.uint8), np.zeros(1, np.int64)  # no mask, of no request


class Packed(NamedTuple):
    """The arrays of one call, N tokens of B requests; plugins/super_tree_attention has the table of their meaning.

    token_ids, positions int64 [N]; past_lens int32 [B]; seq_begins, block_begins, tree_mask_begins int32 [B+1];
    block_indices int32; tree_mask uint8; logit_rows int64 [R], the rows whose next token is asked for; ``padded_to``:
    tokens to which an engine pads the pass, 0 where the planner leaves that to it.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    past_lens: np.ndarray
    seq_begins: np.ndarray
    block_indices: np.ndarray
    block_begins: np.ndarray
    tree_mask: np.ndarray
    tree_mask_begins: np.ndarray
    logit_rows: np.ndarray
    padded_to: int = 0


def pack(
    token_ids: np.ndarray,
    positions: np.ndarray,
    past: np.ndarray,
    counts: np.ndarray,
    block_table: np.ndarray,
    logit_rows: np.ndarray,
    mask: tuple[np.ndarray, np.ndarray] | None = None,
    padded_to: int = 0,
) -> Packed:
    """counts [B]: tokens of each request; past [B]: its committed tokens; block_table [B, M]: its KV blocks in order.

    ``mask`` is what ``ancestor_mask`` returns, for the first of the B requests; those after them are causal.
    """
    tree_mask, mask_begins = mask or _CAUSAL
    past_lens, seq_begins, block_begins, tree_mask_begins, block_indices = _sections(
        np.ascontiguousarray(past, np.int64),
        np.ascontiguousarray(counts, np.int64),
        np.ascontiguousarray(block_table, np.int32),
        np.ascontiguousarray(mask_begins, np.int64),
    )
    return Packed(
        token_ids=np.ascontiguousarray(token_ids, np.int64),
        positions=np.ascontiguousarray(positions, np.int64),
        past_lens=past_lens,
        seq_begins=seq_begins,
        block_indices=block_indices,
        block_begins=block_begins,
        tree_mask=tree_mask,
        tree_mask_begins=tree_mask_begins,
        logit_rows=np.ascontiguousarray(logit_rows, np.int64),
        padded_to=padded_to,
    )


@compiled("Tuple((i4[::1], i4[::1], i4[::1], i4[::1], i4[::1]))(i8[::1], i8[::1], i4[:, ::1], i8[::1])")
def _sections(
    past: np.ndarray, counts: np.ndarray, block_table: np.ndarray, mask_begins: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``past`` [B], where each request's tokens, blocks and mask begin, [B+1] each, and those blocks."""
    requests, last = len(past), len(mask_begins) - 1
    seq, block = np.zeros(requests + 1, np.int32), np.zeros(requests + 1, np.int32)
    area = np.empty(requests + 1, np.int32)
    for i in range(requests + 1):
        area[i] = mask_begins[min(i, last)]
    for i in range(requests):
        seq[i + 1] = seq[i] + counts[i]
        block[i + 1] = block[i] + (past[i] + counts[i] + BLOCK - 1) // BLOCK
    indices = np.empty(block[requests], np.int32)
    for i in range(requests):
        used = block[i + 1] - block[i]
        indices[block[i] : block[i + 1]] = block_table[i, :used]
    return past.astype(np.int32), seq, block, area, indices
