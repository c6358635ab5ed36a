"""Pack trees, single tokens and prompt chunks into one engine call.

Requests are put end to end instead of being padded to one length. An engine may still pad the whole call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from echo_trt.speculation.arrays import begins, ragged_arange

BLOCK = 32  # tokens in a KV block
_CAUSAL = np.zeros(0, np.uint8), np.zeros(1, np.int64)  # no mask, of no request
_NONE = np.zeros(0, np.int64)


class ForwardBatch(NamedTuple):
    """The arrays of one call, N tokens of B requests; plugins/super_tree_attention has the table of their meaning.

    token_ids         int64 [N], and positions int64 [N] in their texts
    past_lens         int32 [B], a request's tokens in the KV cache
    seq_begins        int32 [B+1], where a request's tokens begin
    block_indices     int32 [sum of blocks], KV blocks, request by request
    block_begins      int32 [B+1], where a request's blocks begin
    tree_mask         uint8 [sum K_i^2], as of ``ancestor_mask``
    tree_mask_begins  int32 [B+1], where a request's matrix begins; an empty one is causal
    logit_rows        int64 [R], rows whose next token is asked for
    padded_to         tokens to which an engine pads the pass; 0: the engine chooses
    slots             int64 [B], a request's slot, for what an engine keeps of it beside KV blocks; empty: any
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
    slots: np.ndarray = _NONE


#: Rows up to which a pass of a draft takes a GPU as long as one row, since reading the weights takes longer than
#: computing: by their data sheets an H100 computes some 300 rows meanwhile, an RTX 4090 160. Larger: fewer waits at
#: gates, and wider drafts of goodput; but beyond what the card computes meanwhile, levels take longer.
WEIGHT_ROWS = 128


class LevelShape(NamedTuple):
    """Levels of a draft that run where it computes, without a return to the host.

    first   number of the first one; level 1 expands children of the roots
    levels  how many; 0: the roots' pass alone
    beams   nodes of a request that a level expands
    width   children of an expanded node, the best ones
    """

    first: int
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
) -> tuple[ForwardBatch, np.ndarray]:
    """Pack a block drafter's pass: context rows of A requests, and a block behind them.

    tokens       int [sum counts], of the context rows
    past         int64 [A], a request's cached entries
    counts       int64 [A], its context rows
    roots        int [A], tokens of the blocks' first rows; unused if anchored, since ``tokens`` have them
    block_table  int32 [A, M], KV blocks of a request, in order

    A request's packed rows, for a block of R ``rows``; the first row of an anchored block is the newest context row:

        row        context            block as keys      block as queries (only if ``both_ways``)
        number     c = counts         K = R - anchored   K
        token      tokens             root, mask, ...    root, mask, ...
        position   past, ...          past + c, ...      past + c, ...
        attends    rows up to it      rows up to it      context and all keys

    Attention is causal, so that a block whose rows see each other is packed twice. A query does not see queries, not
    even itself, since its copy is among the keys. The last R rows are the logit rows.

    Returns the call, and the state index of each packed row, int64 [N]. States of the A * R block rows come first,
    states of the context rows follow.
    """
    requests, block_rows, lengths = len(counts), shape.rows - shape.anchored, counts + shape.appended
    request, offset = np.repeat(np.arange(requests), lengths), ragged_arange(lengths)
    is_context = offset < counts[request]
    block_row = (offset - counts[request]) % block_rows
    token_ids = np.full(len(request), shape.mask_token)
    token_ids[is_context] = tokens
    if not shape.anchored:
        is_root = ~is_context & (block_row == 0)
        token_ids[is_root] = roots[request[is_root]]
    positions = past[request] + np.where(is_context, offset, counts[request] + block_row)
    first_logit_row = begins(lengths)[1:] - shape.rows
    logit_rows = (first_logit_row[:, None] + np.arange(shape.rows)).reshape(-1)
    context_state = requests * shape.rows + np.cumsum(is_context) - 1
    block_state = request * shape.rows + shape.anchored + block_row
    state_rows = np.where(is_context, context_state, block_state)
    mask = _keys_and_queries_mask(lengths, block_rows) if shape.both_ways else None
    return pack(token_ids, positions, past, lengths, block_table, logit_rows, mask), state_rows


def _keys_and_queries_mask(lengths: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``ancestor_mask`` does, for ``lengths`` int64 [A] causal rows whose last ``queries`` see no query."""
    matrices = [np.tri(length, dtype=np.uint8) for length in lengths]
    for matrix in matrices:
        matrix[-queries:, -queries:] = 0
    return np.concatenate([matrix.reshape(-1) for matrix in matrices]), begins(lengths**2)


def pack(
    token_ids: np.ndarray,
    positions: np.ndarray,
    past: np.ndarray,
    counts: np.ndarray,
    block_table: np.ndarray,
    logit_rows: np.ndarray,
    mask: tuple[np.ndarray, np.ndarray] | None = None,
    padded_to: int = 0,
    slots: np.ndarray = _NONE,
) -> ForwardBatch:
    """Pack ``counts`` int64 [B] tokens per request behind ``past`` int64 [B] cached ones into one call.

    block_table int32 [B, M]: KV blocks of a request, in order. ``mask`` is what ``ancestor_mask`` returns for the first
    requests; the requests after them are causal.
    """
    tree_mask, mask_begins = mask or _CAUSAL
    requests, blocks = len(counts), -(-(past + counts) // BLOCK)
    owner = np.repeat(np.arange(requests), blocks)
    return ForwardBatch(
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
        slots=slots,
    )


def pack_levels(past: np.ndarray, block_table: np.ndarray, shape: LevelShape) -> ForwardBatch:
    """Pack what all levels of ``shape`` share, behind ``past`` int64 [A] cached entries of a request's draft.

    A request has KV rows for the beams of the last level and of all levels above. The device fills in the rest.
    """
    rows = shape.beams * (shape.first - 1 + shape.levels)
    return pack(_NONE, _NONE, past, np.full(len(past), rows), block_table, _NONE)
