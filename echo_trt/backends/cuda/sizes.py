"""The sizes to which a GPU's calls are padded, so that few CUDA graphs serve all of them. Arrays alone, no device."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from echo_trt.backends.base import METADATA
from echo_trt.speculation.pack import pack

Arrays = dict[str, np.ndarray]
Capacity = dict[str, int]  # rows of device memory for an array of which a call sends a part

#: Tokens of a call that is padded and captured: a chunk of 512 beside the trees of all requests. Larger: more graphs,
#: whose launches arithmetic hides.
LARGEST = 1024
_PROMPT_ROWS = 16  # rows of logits of one request's prompt chunk, which ends or not; larger: more rows of padding
_MASK_ROWS = 512  # tokens of one tree that a captured call has room for; larger: more memory
#: Arrays whose rows behind a call's own are never read, since others say where a request's part begins. The first one
#: is sent in one copy with the arrays of a fixed length.
RAGGED = ("block_indices", "tree_mask")


def bucket(count: int) -> int:
    """Return the padded size: the next one of 1, 2, 4, 8, 12, 16, 24, 32, 48, ..., at most a half more."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 16 and count <= 3 * power // 4 else power


SIZES = tuple(sorted({bucket(count) for count in range(1, LARGEST + 1)}))  # of calls, in tokens


@dataclass(frozen=True)
class CallBounds:
    """The largest calls that an engine gets.

    requests  in one call
    blocks    KV blocks of one request
    tree      tokens of one request of which all logits are asked for
    table     KV blocks of all requests together; 0: as many as the requests may have
    """

    requests: int
    blocks: int
    tree: int = LARGEST
    table: int = 0


class Size(NamedTuple):
    """A captured size: tokens, rows of logits and requests of a call that is padded to it."""

    tokens: int
    rows: int
    requests: int


def graph_sizes(requests: int, tree: int = LARGEST) -> tuple[Size, ...]:
    """List the sizes to capture for calls of up to ``requests`` requests, so that each smaller call has one.

    Of each number of tokens: for 1, 4, 16, ... requests, since the kernel's tiles follow from the tokens of a request.
    A tile holds those of twice the padded mean, so up to four times as many requests as there are still let a tree read
    its KV twice at most. From 64 tokens on, also for calls that ask for few rows of logits, such as prompt chunks: the
    rows of padding would cost a product with the whole vocabulary.
    """
    maximum, sizes = bucket(requests), set()
    for tokens in SIZES:
        counts = {count for count in (4**power for power in range(10)) if count < min(tokens, maximum)}
        for count in counts | {min(tokens, maximum)}:
            if tokens < 64 or count > 1 or tokens <= bucket(tree):
                sizes.add(Size(tokens, tokens, count))
        if tokens >= 64:
            sizes |= {Size(tokens, _PROMPT_ROWS, 1), Size(tokens, tokens // 4, min(tokens, maximum))}
    return tuple(sorted(sizes))


def size_for(arrays: Arrays, sizes: Iterable[Size]) -> Size | None:
    """Return the first of ``sizes`` that holds a call; None where there is none, or where entries are of two kinds."""
    parts = [len(arrays[name]) for name in ("features", "hidden") if name in arrays]
    wanted = len(arrays["token_ids"]), len(arrays["logit_rows"]), len(arrays["past_lens"])
    if np.count_nonzero(parts) > 1 or not wanted[0]:
        return None
    return next((size for size in sizes if all(n <= maximum for n, maximum in zip(wanted, size, strict=True))), None)


def capacity_of(size: Size, bounds: CallBounds) -> Capacity:
    """Return rows of memory for the ragged arrays of a call of ``size``."""
    table = size.requests * bounds.blocks
    table = min(table, bounds.table) if bounds.table else table
    return {"block_indices": table, "tree_mask": size.tokens * min(size.tokens, _MASK_ROWS)}


def pad(arrays: Arrays, size: Size) -> Arrays:
    """Pad a call to ``size``, but for its ragged arrays, which stay as long as they are.

    Padding is tokens without a request, and requests without tokens, which the call does not see. Output rows of
    padding are undefined.
    """
    kinds = [name for name in ("features", "hidden") if name in arrays]
    # A head's call has entries of one kind. A block drafter's has but one kind, and perhaps none of it.
    there = {name: "state_rows" in arrays or len(arrays[name]) > 0 for name in kinds}
    sizes = {
        **dict.fromkeys(("token_ids", "positions", "state_rows"), size.tokens),
        **{name: size.tokens if there[name] else 0 for name in kinds},
        "logit_rows": size.rows,
        "past_lens": size.requests,
        **dict.fromkeys(("seq_begins", "block_begins", "tree_mask_begins"), size.requests + 1),
    }
    if "state_rows" in arrays:  # the states of features follow the states of logit rows, and padding adds logit rows
        states, requested = arrays["state_rows"], len(arrays["logit_rows"])
        arrays = arrays | {"state_rows": np.where(states < requested, states, states + size.rows - requested)}
    return {
        name: array if name in RAGGED else _padded(array, sizes[name], name.endswith("_begins"))
        for name, array in arrays.items()
    }


def _padded(array: np.ndarray, size: int, repeat_last: bool) -> np.ndarray:
    out = np.zeros((size, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    if repeat_last:
        out[len(array) :] = array[-1]
    return out


def empty_call(size: Size, bounds: CallBounds, inputs: Collection[str]) -> tuple[Arrays, Capacity]:
    """Return a call without requests that is padded to ``size``, and its capacity.

    inputs  the network's. Entries of a head that takes ``features`` or ``hidden`` states, by their numbers in feature
            caches, have features: its levels have graphs of their own
    """
    none = np.zeros(0, np.int64)
    call = pack(none, none, none, none, np.zeros((0, 1), np.int64), none)
    arrays = {name: getattr(call, name) for name in ("token_ids", "positions", *METADATA, "logit_rows")}
    if "state_rows" in inputs:
        arrays["state_rows"] = none
    kinds = [name for name in ("features", "hidden") if name in inputs]
    arrays |= {name: np.zeros(int(name == kinds[0]), np.int64) for name in kinds}
    return pad(arrays, size), capacity_of(size, bounds)
