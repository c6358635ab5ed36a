"""Packed calls as launches of a compiled engine: divided to fit its profiles, padded to few sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from echo_trt.backends.base import METADATA
from echo_trt.backends.cuda.sizes import Arrays, CallBounds, Capacity, Size, capacity_of, pad, size_for
from echo_trt.speculation.pack import ForwardBatch
from super_tree_attention.tensorrt_plugin import words


@dataclass(frozen=True)
class MicroBatch:
    """One launch.

    arrays       inputs by name
    capacity     rows of memory for inputs that are shorter in this launch
    begin        the first of the packed call's rows that it computes
    count        the number of them
    requested    int [R], indices into the packed call's logit_rows, to which the first rows of logits belong
    padded       whether the inputs have a size that recurs
    """

    arrays: Arrays
    capacity: Capacity
    begin: int
    count: int
    requested: np.ndarray
    padded: bool

    @property
    def tokens(self) -> int:
        return self.arrays["token_ids"].size


def packed_pieces(
    call: ForwardBatch, inputs: Arrays, tokens: int, sizes: Sequence[Size], bounds: CallBounds
) -> Iterator[MicroBatch]:
    """Divide a call into launches of at most ``tokens`` tokens: each takes as many of the next requests as fit.

    A launch is padded to the first of ``sizes`` that holds it, where its block table is within ``bounds``.
    """
    counts = np.diff(call.seq_begins)
    begin = 0
    while begin < len(counts):
        ends = np.cumsum(counts[begin:])
        taken = max(int(np.searchsorted(ends, tokens, side="right")), 1)
        yield _packed_piece(call, begin, begin + taken, inputs, sizes, bounds)
        begin += taken


def _packed_piece(
    call: ForwardBatch, begin: int, end: int, inputs: Arrays, sizes: Sequence[Size], bounds: CallBounds
) -> MicroBatch:
    """Make a launch of the requests ``begin`` to ``end``."""
    first, last = int(call.seq_begins[begin]), int(call.seq_begins[end])
    requested = np.flatnonzero((call.logit_rows >= first) & (call.logit_rows < last))
    blocks, masks = (b[begin : end + 1] for b in (call.block_begins, call.tree_mask_begins))
    part = call._replace(
        token_ids=call.token_ids[first:last],
        positions=call.positions[first:last],
        past_lens=call.past_lens[begin:end],
        seq_begins=call.seq_begins[begin : end + 1] - first,
        block_indices=call.block_indices[blocks[0] : blocks[-1]],
        block_begins=blocks - blocks[0],
        tree_mask=call.tree_mask[masks[0] : masks[-1]],
        tree_mask_begins=masks - masks[0],
        logit_rows=call.logit_rows[requested] - first,
    )
    if "hidden" not in inputs and "state_rows" in inputs:
        rows = max(len(requested), 1)
        features, state_index = piece_states(
            inputs["state_rows"][first:last], requested, len(call.logit_rows), inputs["features"], rows
        )
        inputs = {"features": features, "state_rows": state_index}
    elif "features" in inputs:
        split_at = len(inputs["features"])
        features = inputs["features"][min(first, split_at) : min(last, split_at)]
        hidden = inputs["hidden"][max(first - split_at, 0) : max(last - split_at, 0)]
        inputs = {"features": features, "hidden": hidden}
    arrays = {name: getattr(part, name) for name in ("token_ids", "positions", *METADATA)} | inputs
    arrays["logit_rows"] = part.logit_rows if len(part.logit_rows) else np.zeros(1, np.int64)
    size = size_for(arrays, sizes)
    capacity = capacity_of(size, bounds) if size else {}
    if size and all(len(arrays[name]) <= maximum for name, maximum in capacity.items()):
        arrays = pad(arrays, size)
    else:
        size, capacity = None, {}
    arrays, capacity = in_words(arrays, capacity)
    return MicroBatch(arrays, capacity, first, last - first, requested, size is not None)


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


def in_words(arrays: Arrays, capacity: Capacity) -> tuple[Arrays, Capacity]:
    """Convert the tree mask of a packed launch to the numbers that plugins take, of four bytes each."""
    capacity = {name: -(-maximum // 4) if name == "tree_mask" else maximum for name, maximum in capacity.items()}
    return arrays | {"tree_mask": words(arrays["tree_mask"])}, capacity
