"""A packed call as launches of a compiled engine: divided to what its profiles take, padded to few sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from echo_trt.backends.cuda.calls import Arrays, bucket
from echo_trt.backends.cuda.calls import pad as pad_packed
from echo_trt.backends.padded import Layout, Part, pad, split
from echo_trt.decoding.pack import Packed
from super_tree_attention.tensorrt_plugin import words

if TYPE_CHECKING:
    from echo_trt.backends.tensorrt.session import Session

METADATA = ("past_lens", "seq_begins", "block_indices", "block_begins", "tree_mask", "tree_mask_begins")


@dataclass(frozen=True)
class CallLimits:
    """The largest launch: ``batch`` requests, with ``rows`` rows of logits.

    Native: ``tokens`` of a request beside others, ``chunk`` of one alone. Packed: ``tokens`` in all, of which is chunk.
    """

    batch: int
    tokens: int
    chunk: int
    rows: int

    @classmethod
    def of(cls, session: Session, linear: bool) -> CallLimits:
        last = session.num_profiles - 1
        axis = 1 if linear else 0
        return cls(
            batch=session.most("past_lens", 0, 0 if linear else last),
            tokens=session.most("token_ids", axis, 0 if linear else last),
            chunk=session.most("token_ids", axis, last),
            rows=session.most("logit_rows", 0, 0 if linear else last),
        )


@dataclass(frozen=True)
class Piece:
    """One launch, over the slots from ``first`` on; ``arrays`` are its inputs, ``padded`` to a size that others share.

    The packed call's ``rows`` [n] are at ``places`` [n] of its tokens. Its first rows of logits answer ``asked``, which
    are indices into the packed call's logit_rows.
    """

    arrays: Arrays
    rows: np.ndarray
    places: np.ndarray
    asked: np.ndarray
    padded: bool
    first: int = 0

    @property
    def tokens(self) -> int:
        return self.arrays["token_ids"].size


def linear_pieces(call: Packed, inputs: Arrays, layout: Layout, limits: CallLimits) -> Iterator[Piece]:
    """For the native graph."""
    for part in split(call, layout, limits.tokens):
        for group in _groups(call, part, limits):
            yield _linear_piece(call, group, inputs, layout, limits)


def _groups(call: Packed, part: Part, limits: CallLimits) -> Iterator[Part]:
    """The same work in launches that ask for no more rows of logits than one has room for."""
    request = np.searchsorted(call.seq_begins, call.logit_rows, side="right") - 1
    asked = np.bincount(request, minlength=len(call.past_lens))[part.requests]
    if len(part.requests) == 1 or asked.sum() <= limits.rows:
        yield part
        return
    # None asks for more than limits.tokens, so that a group's first can exceed its share by so many at most.
    group = np.cumsum(asked) // (limits.rows - limits.tokens + 1)
    for g in np.unique(group):
        yield Part(part.requests[group == g], part.starts[group == g], part.counts[group == g])


def _linear_piece(call: Packed, part: Part, inputs: Arrays, layout: Layout, limits: CallLimits) -> Piece:
    longest = int(part.counts.max())
    span = int(np.ptp(layout.slots_of(call)[part.requests])) + 1
    short = longest <= limits.tokens
    batch = min(bucket(span), layout.slots) if short else 1
    tokens = min(bucket(longest), limits.tokens if short else limits.chunk)
    padded = pad(call, part, layout, batch, tokens)
    names = ("token_ids", "positions", "past_lens", "tree_mask")
    arrays = {name: getattr(padded, name) for name in names}
    asked = np.zeros(min(bucket(max(len(padded.asked), 1)), limits.rows if short else limits.chunk), np.int64)
    asked[: len(padded.asked)] = padded.logit_rows
    arrays["logit_rows"] = asked
    if "features" in inputs:
        features, hidden, own = _states(padded.rows, inputs["features"], inputs["hidden"])
        state_rows = np.zeros(batch * tokens, np.int64)
        state_rows[padded.places] = own
        arrays |= {"features": features, "hidden": hidden, "state_rows": state_rows.reshape(batch, tokens)}
    return Piece(arrays, padded.rows, padded.places, padded.asked, True, padded.first)


def _states(rows: np.ndarray, features: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a head's inputs those of the packed ``rows`` [n], padded, and each row's place in the two end to end [n]."""
    of_target = rows < len(features)
    chosen = features[rows[of_target]], hidden[rows[~of_target] - len(features)]
    first, second = (np.zeros((bucket(len(a)) if len(a) else 0, a.shape[1]), a.dtype) for a in chosen)
    first[: len(chosen[0])], second[: len(chosen[1])] = chosen
    place = np.where(of_target, np.cumsum(of_target) - 1, len(first) + np.cumsum(~of_target) - 1)
    return first, second, place


def packed_pieces(call: Packed, inputs: Arrays, limits: CallLimits) -> Iterator[Piece]:
    """For the graph with the plugin: as many of the next requests as a launch takes."""
    counts = np.diff(call.seq_begins)
    begin = 0
    while begin < len(counts):
        tokens = np.cumsum(counts[begin:])
        taken = max(int(np.searchsorted(tokens, limits.tokens, side="right")), 1)
        yield _packed_piece(*_requests(call, begin, begin + taken, inputs))
        begin += taken


def _requests(call: Packed, begin: int, end: int, inputs: Arrays) -> tuple[Packed, Arrays, np.ndarray, np.ndarray]:
    """Requests begin to end as a call of their own, their further inputs, their rows and their ``asked``."""
    first, last = int(call.seq_begins[begin]), int(call.seq_begins[end])
    asked = np.flatnonzero((call.logit_rows >= first) & (call.logit_rows < last))
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
        logit_rows=call.logit_rows[asked] - first,
    )
    if "features" in inputs:
        split_at = len(inputs["features"])
        features = inputs["features"][min(first, split_at) : min(last, split_at)]
        hidden = inputs["hidden"][max(first - split_at, 0) : max(last - split_at, 0)]
        inputs = {"features": features, "hidden": hidden}
    return part, inputs, np.arange(first, last), asked


def _packed_piece(part: Packed, inputs: Arrays, rows: np.ndarray, asked: np.ndarray) -> Piece:
    names = ("token_ids", "positions", *METADATA)
    arrays = {name: getattr(part, name) for name in names} | inputs
    arrays["logit_rows"] = part.logit_rows if len(part.logit_rows) else np.zeros(1, np.int64)
    padded = pad_packed(arrays)
    arrays = padded or arrays
    arrays["tree_mask"] = words(arrays["tree_mask"])
    return Piece(arrays, rows, np.arange(len(rows)), asked, padded is not None)
