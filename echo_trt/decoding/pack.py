"""Flatten and pack: a ragged batch of prompt chunks, single tokens and trees as one engine call, without padding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from echo_trt.decoding.arrays import begins, ragged_arange

BLOCK = 32  # tokens in a KV block
_CAUSAL = np.zeros(0, np.uint8), np.zeros(1, np.int64)  # no mask, of no request


class Packed(NamedTuple):
    """The arrays of one call, N tokens of B requests; plugins/super_tree_attention has the table of their meaning.

    token_ids, positions int64 [N]; past_lens int32 [B]; seq_begins, block_begins, tree_mask_begins int32 [B+1];
    block_indices int32; tree_mask uint8; logit_rows int64 [R]: rows whose next token is asked for; padded_to: tokens
    to which an engine pads the pass, 0 where the planner leaves that to it.
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
    """Pack ``counts`` int64 [B] tokens a request behind ``past`` int64 [B] cached ones into one call.

    block_table int32 [B, M]: KV blocks of a request, in order. ``mask`` is what ``ancestor_mask`` returns for the first
    requests; the requests after them are causal.
    """
    tree_mask, mask_begins = mask or _CAUSAL
    requests, blocks = len(counts), -(-(past + counts) // BLOCK)
    owner = np.repeat(np.arange(requests), blocks)
    return Packed(
        token_ids=np.ascontiguousarray(token_ids, np.int64),
        positions=np.ascontiguousarray(positions, np.int64),
        past_lens=past.astype(np.int32),
        seq_begins=begins(counts).astype(np.int32),
        block_indices=block_table[owner, ragged_arange(blocks)].astype(np.int32),
        block_begins=begins(blocks).astype(np.int32),
        tree_mask=tree_mask,
        tree_mask_begins=mask_begins[np.minimum(np.arange(requests + 1), len(mask_begins) - 1)].astype(np.int32),
        logit_rows=np.ascontiguousarray(logit_rows, np.int64),
        padded_to=padded_to,
    )
