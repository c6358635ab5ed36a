"""Pack trees, single tokens and prompt chunks into one engine call.

Requests are put end to end instead of being padded to one length. An engine may still pad the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from echo_trt.decoding.arrays import begins, ragged_arange

BLOCK = 32  # tokens in a KV block
ROOT = -1  # number of the root among nodes that are drafted on a device
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


class LevelShape(NamedTuple):
    """How far a draft looks ahead where it computes.

    levels  below the roots' children
    beams   nodes of a request that a level expands
    width   children of an expanded node, the best ones
    """

    levels: int
    beams: int
    width: int


@dataclass(frozen=True)
class BlockShape:
    """The rows that a block drafter's pass has for a request behind its context.

    rows        number of rows of the block; each row proposes a token
    mask_token  token id of all rows but the first
    both_ways   whether all rows of the block see each other, else a row sees those before it
    anchored    whether the newest context row is the block's first one
    """

    rows: int
    mask_token: int
    both_ways: bool
    anchored: bool

    @property
    def appended(self) -> int:
        """Packed rows behind a request's context."""
        return (self.rows - self.anchored) * (2 if self.both_ways else 1)


def pack_blocks(
    shape: BlockShape,
    tokens: np.ndarray,
    past: np.ndarray,
    counts: np.ndarray,
    roots: np.ndarray,
    block_table: np.ndarray,
) -> tuple[Packed, np.ndarray]:
    """Pack a block drafter's pass: ``counts`` int64 [A] context rows a request, and its block.

    tokens  int [sum counts], of the context rows. roots  int [A], the first tokens of the blocks.

    Attention is causal. A block whose rows see each other both ways is therefore packed twice, first as keys, then as
    queries: a query sees the context, all keys and itself.

        context rows | rows as keys | rows as queries (the logit rows)

    Returns the call, and the state index of each packed row, int64 [N]. States of the A * rows block rows come first,
    states of the context rows follow.
    """
    requests, total = len(counts), counts + shape.appended
    owner, place = np.repeat(np.arange(requests), total), ragged_arange(total)
    new = shape.rows - shape.anchored
    behind = place - counts[owner]
    context, row = behind < 0, behind % new
    token_ids = np.full(len(owner), shape.mask_token)
    token_ids[context] = tokens
    if not shape.anchored:
        first = ~context & (row == 0)
        token_ids[first] = roots[owner[first]]
    positions = past[owner] + np.where(context, place, counts[owner] + row)
    looking = begins(total)[1:] - shape.rows
    logit_rows = (looking[:, None] + np.arange(shape.rows)).reshape(-1)
    in_block = owner * shape.rows + shape.anchored + row
    state_rows = np.where(context, requests * shape.rows + np.cumsum(context) - 1, in_block)
    mask = None
    if shape.both_ways:
        matrices = [np.tri(size, dtype=np.uint8) for size in total]
        for matrix in matrices:
            matrix[-new:, -new:] = 0
        mask = np.concatenate([matrix.reshape(-1) for matrix in matrices]), begins(total**2)
    return pack(token_ids, positions, past, total, block_table, logit_rows, mask), state_rows


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


def pack_levels(past: np.ndarray, block_table: np.ndarray, shape: LevelShape) -> Packed:
    """Pack the last level's call of ``shape``, behind ``past`` int64 [A] cached entries of a request's draft.

    A request has beams * levels rows: the level's rows, and the rows of all levels above. The device fills in tokens
    and masks.
    """
    rows = shape.beams * shape.levels
    none = np.zeros(0, np.int64)
    return pack(none, none, past, np.full(len(past), rows), block_table, none)
