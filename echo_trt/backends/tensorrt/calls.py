"""Packed calls as launches of a compiled engine: divided to fit its profiles, padded to few sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echo_trt.backends.base import METADATA
from echo_trt.backends.cuda.sizes import Arrays, CallBounds, Capacity, Size, bucket, capacity_of, size_for
from echo_trt.backends.cuda.sizes import pad as pad_packed
from echo_trt.backends.padded import CallPart, SlotLayout, pad, piece_states, split
from echo_trt.speculation.pack import ForwardBatch
from super_tree_attention.tensorrt_plugin import words

if TYPE_CHECKING:
    from echo_trt.backends.tensorrt.session import Session


@dataclass(frozen=True)
class CallLimits:
    """The largest launch of an engine.

    batch   requests
    tokens  native: of one request in a launch with others; packed: of all requests
    chunk   tokens of one request in a launch of its own
    rows    rows of logits
    """

    batch: int
    tokens: int
    chunk: int
    rows: int

    @classmethod
    def of(cls, session: Session, contiguous: bool) -> CallLimits:
        last = session.num_profiles - 1
        axis, usual = (1, 0) if contiguous else (0, last)
        return cls(
            batch=session.largest("past_lens", 0, usual),
            tokens=session.largest("token_ids", axis, usual),
            chunk=session.largest("token_ids", axis, last),
            rows=session.largest("logit_rows", 0, usual),
        )


@dataclass(frozen=True)
class MicroBatch:
    """One launch over the slots from ``first`` on.

    arrays       inputs by name
    capacity     rows of memory for inputs that are shorter in this launch
    rows         int [n], the packed call's rows that it computes
    padded_rows  int [n], their indices among the launch's tokens
    requested    int [R], indices into the packed call's logit_rows, to which the first rows of logits belong
    padded       whether the inputs have a size that recurs
    """

    arrays: Arrays
    capacity: Capacity
    rows: np.ndarray
    padded_rows: np.ndarray
    requested: np.ndarray
    padded: bool
    first: int = 0

    @property
    def tokens(self) -> int:
        return self.arrays["token_ids"].size


def linear_pieces(call: ForwardBatch, inputs: Arrays, layout: SlotLayout, limits: CallLimits) -> Iterator[MicroBatch]:
    for part in split(call, layout, limits.tokens):
        for group in _groups(call, part, limits):
            yield _linear_piece(call, group, inputs, layout, limits)


def _groups(call: ForwardBatch, part: CallPart, limits: CallLimits) -> Iterator[CallPart]:
    """Divide a part into launches within the limit of rows of logits."""
    request = np.searchsorted(call.seq_begins, call.logit_rows, side="right") - 1
    requested = np.bincount(request, minlength=len(call.past_lens))[part.requests]
    if len(part.requests) == 1 or requested.sum() <= limits.rows:
        yield part
        return
    # A request has at most limits.tokens rows, by which a group's first request can exceed the group's share.
    group = np.cumsum(requested) // (limits.rows - limits.tokens + 1)
    for g in np.unique(group):
        yield CallPart(part.requests[group == g], part.starts[group == g], part.counts[group == g])


def _linear_piece(
    call: ForwardBatch, part: CallPart, inputs: Arrays, layout: SlotLayout, limits: CallLimits
) -> MicroBatch:
    longest = int(part.counts.max())
    span = int(np.ptp(layout.slots_of(call)[part.requests])) + 1
    short = longest <= limits.tokens
    batch = min(bucket(span), layout.slots) if short else 1
    tokens = min(bucket(longest), limits.tokens if short else limits.chunk)
    padded = pad(call, part, layout, batch, tokens)
    names = ("token_ids", "positions", "past_lens", "tree_mask")
    arrays = {name: getattr(padded, name) for name in names}
    requested = np.zeros(min(bucket(max(len(padded.requested), 1)), limits.rows if short else limits.chunk), np.int64)
    requested[: len(padded.requested)] = padded.logit_rows
    arrays["logit_rows"] = requested
    if "hidden" not in inputs and "state_rows" in inputs:
        chosen, state_index = piece_states(
            inputs["state_rows"][padded.rows],
            padded.requested,
            len(call.logit_rows),
            inputs["features"],
            len(requested),
        )
        features = np.zeros((bucket(len(chosen)) if len(chosen) else 0, *chosen.shape[1:]), chosen.dtype)
        features[: len(chosen)] = chosen
        padded.state_rows.flat[:] = 0
        padded.state_rows.flat[padded.padded_rows] = state_index
        arrays |= {"features": features, "state_rows": padded.state_rows}
    elif "features" in inputs:
        features, hidden, state_index = _states(padded.rows, inputs["features"], inputs["hidden"])
        state_rows = np.zeros(batch * tokens, np.int64)
        state_rows[padded.padded_rows] = state_index
        arrays |= {"features": features, "hidden": hidden, "state_rows": state_rows.reshape(batch, tokens)}
    return MicroBatch(arrays, {}, padded.rows, padded.padded_rows, padded.requested, True, padded.first)


def _states(rows: np.ndarray, features: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select a head's inputs for the packed ``rows``, int [n], padded, and the rows' indices in both end to end [n]."""
    of_target = rows < len(features)
    chosen = features[rows[of_target]], hidden[rows[~of_target] - len(features)]
    first, second = (np.zeros((bucket(len(a)) if len(a) else 0, *a.shape[1:]), a.dtype) for a in chosen)
    first[: len(chosen[0])], second[: len(chosen[1])] = chosen
    state_index = np.where(of_target, np.cumsum(of_target) - 1, len(first) + np.cumsum(~of_target) - 1)
    return first, second, state_index


def packed_pieces(
    call: ForwardBatch, inputs: Arrays, limits: CallLimits, sizes: Sequence[Size], bounds: CallBounds
) -> Iterator[MicroBatch]:
    """Divide a call for the graph with the plugin: a launch takes as many of the next requests as fit.

    A launch is padded to the first of ``sizes`` that holds it, where its block table is within ``bounds``.
    """
    counts = np.diff(call.seq_begins)
    begin = 0
    while begin < len(counts):
        tokens = np.cumsum(counts[begin:])
        taken = max(int(np.searchsorted(tokens, limits.tokens, side="right")), 1)
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
        arrays = pad_packed(arrays, size)
    else:
        size, capacity = None, {}
    arrays, capacity = in_words(arrays, capacity)
    return MicroBatch(arrays, capacity, np.arange(first, last), np.arange(last - first), requested, size is not None)


def in_words(arrays: Arrays, capacity: Capacity) -> tuple[Arrays, Capacity]:
    """Convert the tree mask of a packed launch to the numbers that plugins take, of four bytes each."""
    capacity = {name: -(-maximum // 4) if name == "tree_mask" else maximum for name, maximum in capacity.items()}
    return arrays | {"tree_mask": words(arrays["tree_mask"])}, capacity
