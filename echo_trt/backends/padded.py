"""Conversion of packed to padded calls and back, for the graphs of ``native_export``, which lists their inputs.

A linear engine has one cache per slot: slot s holds the pool's blocks s * M to s * M + M - 1, and a graph's batch row
is a slot. A call covers a range of slots. Slots in the range without new tokens are padding, which is written to spare
rows past the slot's M blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.arrays import begins, ragged_arange
from echo_trt.speculation.pack import BLOCK, ForwardBatch

#: Cost of one more call, in tokens: about where computing takes as long as reading the weights. Larger: more padding.
CALL_TOKENS = 64
#: Outputs with a row for every token; other outputs have one for every row of ``logit_rows``.
ROW_OUTPUTS = ("features", "state")


@dataclass(frozen=True)
class SlotLayout:
    """The caches of ``slots``: ``blocks`` KV blocks per slot, and ``spare`` rows for the new tokens of one call."""

    slots: int
    blocks: int
    spare: int

    @property
    def rows(self) -> int:
        """C, the rows of a slot's cache."""
        return self.blocks * BLOCK + self.spare

    def slots_of(self, call: ForwardBatch) -> np.ndarray:
        """Return the slots of a call's requests, int [B]."""
        first = call.block_indices[call.block_begins[:-1]]
        if (first % self.blocks).any():
            raise ValueError(f"KV blocks {first} do not begin a slot of {self.blocks}: this engine needs linear slots")
        return first // self.blocks

    def slots_and_rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return slots and cache rows, int [m] both, of pool ``rows``, int [m]."""
        return np.divmod(rows, self.blocks * BLOCK)


@dataclass(frozen=True)
class CallPart:
    """The tokens of a packed call that one padded call computes.

    requests  int [b], indices into the packed call's requests
    starts    int [b], first token of the request
    counts    int [b], tokens of the request
    """

    requests: np.ndarray
    starts: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Padded:
    """One padded call over the slots from ``first`` on: the graph's inputs (``native_export``), and its way back.

    rows         int [n], packed rows that it computes
    padded_rows  int [n], their indices among the N = B * T padded rows
    requested    int [R], indices into the packed call's ``logit_rows``
    """

    first: int
    token_ids: np.ndarray
    positions: np.ndarray
    state_rows: np.ndarray
    past_lens: np.ndarray
    tree_mask: np.ndarray
    logit_rows: np.ndarray
    rows: np.ndarray
    padded_rows: np.ndarray
    requested: np.ndarray


def split(call: ForwardBatch, layout: SlotLayout, together: int | None = None) -> list[CallPart]:
    """Divide ``call`` into parts with little padding: long prompt chunks alone, all other requests together.

    A request of more than ``together`` tokens is always alone. A prompt chunk of more than ``layout.spare`` tokens is
    computed in several parts.
    """
    counts, slots = np.diff(call.seq_begins), layout.slots_of(call)
    order = np.argsort(-counts, kind="stable")
    longest_first, ordered = counts[order], slots[order]
    # By k: the k longest requests are apart, and the others share a range of slots with the longest of them as T.
    apart = begins(longest_first + CALL_TOKENS)
    lowest, highest = (f.accumulate(ordered[::-1])[::-1] for f in (np.minimum, np.maximum))
    shared = np.append((highest - lowest + 1) * longest_first + CALL_TOKENS, 0)
    cost = apart + shared
    maximum = layout.spare if together is None else together
    cost[: np.count_nonzero(counts > maximum)] = np.iinfo(np.int64).max
    k = int(cost.argmin())
    rest = order[k:]
    parts = [CallPart(rest, np.zeros_like(rest), counts[rest])] if len(rest) else []
    return parts + [piece for request in order[:k] for piece in _pieces(call, request, counts[request], layout.spare)]


def _pieces(call: ForwardBatch, request: int, count: int, maximum: int) -> Iterator[CallPart]:
    if count > maximum and call.tree_mask_begins[request] < call.tree_mask_begins[request + 1]:
        raise ValueError(f"a tree of {count} nodes, but the caches were built for {maximum} new tokens per call")
    for start in range(0, count, maximum):
        yield CallPart(np.array([request]), np.array([start]), np.array([min(maximum, count - start)]))


def pad(call: ForwardBatch, part: CallPart, layout: SlotLayout, batch: int = 1, tokens: int = 1) -> Padded:
    """Pad a part of a call; ``batch`` and ``tokens`` are the least B and T, so that few sizes come up."""
    slots, counts, requests = layout.slots_of(call)[part.requests], part.counts, part.requests
    tokens, batch = max(tokens, int(counts.max())), max(batch, int(np.ptp(slots)) + 1)
    first = min(int(slots.min()), layout.slots - batch)
    row = slots - first
    rows = np.repeat(call.seq_begins[requests] + part.starts, counts) + ragged_arange(counts)
    padded_rows = np.repeat(row * tokens, counts) + ragged_arange(counts)

    def padded(values: np.ndarray) -> np.ndarray:
        array = np.zeros(batch * tokens, np.int64)
        array[padded_rows] = values
        return array.reshape(batch, tokens)

    padded_row_of = np.full(len(call.token_ids), -1)
    padded_row_of[rows] = padded_rows
    requested = np.flatnonzero(padded_row_of[call.logit_rows] >= 0)
    past_lens = np.full(batch, layout.rows - tokens, np.int32)
    past_lens[row] = call.past_lens[requests] + part.starts
    return Padded(
        first=first,
        token_ids=padded(call.token_ids[rows]),
        positions=padded(call.positions[rows]),
        state_rows=padded(rows),
        past_lens=past_lens,
        tree_mask=_tree_mask(call, part, row, batch, tokens),
        logit_rows=padded_row_of[call.logit_rows[requested]],
        rows=rows,
        padded_rows=padded_rows,
        requested=requested,
    )


def _tree_mask(call: ForwardBatch, part: CallPart, row: np.ndarray, batch: int, tokens: int) -> np.ndarray:
    """Build the mask, uint8 [B, T, T]: ancestors for trees, causal for chains, zeros for padding."""
    counts = np.zeros(batch, np.int64)
    counts[row] = part.counts
    mask = np.tri(tokens, dtype=np.uint8) * (np.arange(tokens)[:, None] < counts[:, None, None])
    sizes = np.diff(call.tree_mask_begins)[part.requests]
    tree = sizes > 0
    if not tree.any():
        return mask
    row, sizes, section = row[tree], sizes[tree], call.tree_mask_begins[part.requests[tree]]
    element, width = ragged_arange(sizes), np.repeat(part.counts[tree], sizes)
    mask[np.repeat(row, sizes), element // width, element % width] = call.tree_mask[np.repeat(section, sizes) + element]
    return mask


def piece_states(
    states: np.ndarray, requested: np.ndarray, total: int, features: np.ndarray, rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Select a block drafter's features for a part of a call, and say which states its packed rows are.

    states     int [n], of the part's rows, in the whole call
    requested  int [r], the part's share of the call's ``total`` logit rows
    features   float [M, F], of the whole call
    rows       logit rows that the part is padded to
    """
    in_block = states < total
    state_index = np.zeros(total, np.int64)
    state_index[requested] = np.arange(len(requested))
    renumbered = np.empty(len(states), np.int64)
    renumbered[in_block] = state_index[states[in_block]]
    renumbered[~in_block] = rows + np.arange(np.count_nonzero(~in_block))
    return features[states[~in_block] - total], renumbered
