"""The paths of a call's tokens, as networks with delta-net layers read them (``models.delta_net.DeltaCall``)."""

from __future__ import annotations

import numpy as np

from echo_trt.errors import UserError
from echo_trt.speculation.arrays import compiled, next_size
from echo_trt.speculation.pack import ForwardBatch

#: Inputs of such a network that describe a call's trees, and outputs that a commit of states takes.
TREE_INPUTS = ("tree_rows", "row_places", "ancestors", "conv_rows")
COMMIT_OUTPUTS = ("delta_keys", "delta_updates", "delta_decays", "conv_inputs")
#: Tokens before a token that the convolution reads, besides the token.
CONV_PAST = 3
#: Padded tokens of one request in a call. More: more steps of ``models.delta_net.inverse`` in every pass.
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MAX_ROWS = ROWS[-1]


def tree_inputs(call: ForwardBatch, trees: np.ndarray, count: int, size: int) -> dict[str, np.ndarray]:
    """Return the ``TREE_INPUTS`` of ``call`` whose packed rows are padded to ``size``.

    trees  int64 [B], a request's index among ``count`` padded trees; the others are empty
    """
    longest = int(np.diff(call.seq_begins).max(initial=1))
    if longest > MAX_ROWS:
        raise UserError(f"a request has {longest} tokens in one pass, but a hybrid network takes {MAX_ROWS} at most.")
    rows = next_size(ROWS, longest)
    arrays = _padded(call.seq_begins, call.tree_mask, call.tree_mask_begins, trees, count, size, rows)
    return dict(zip(TREE_INPUTS, arrays, strict=True))


@compiled("Tuple((i8[:, ::1], i8[::1], f4[:, :, ::1], i8[:, ::1]))(i4[::1], u1[::1], i4[::1], i8[::1], i8, i8, i8)")
def _padded(
    seq_begins: np.ndarray,
    tree_mask: np.ndarray,
    mask_begins: np.ndarray,
    trees: np.ndarray,
    number: int,
    size: int,
    rows: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    tree_rows, row_places = np.zeros((number, rows), np.int64), np.zeros(size, np.int64)
    ancestors = np.zeros((number, rows, rows), np.float32)
    conv_rows = np.zeros((size, 3), np.int64)
    for request in range(len(trees)):
        first, tree = seq_begins[request], trees[request]
        count = seq_begins[request + 1] - first
        causal = mask_begins[request + 1] == mask_begins[request]
        for row in range(count):
            tree_rows[tree, row] = first + row
            row_places[first + row] = tree * rows + row
            found = 0
            for above in range(row - 1, -1, -1):  # parents before children: the nearest ancestor is the last
                if causal or tree_mask[mask_begins[request] + row * count + above]:
                    ancestors[tree, row, above] = 1
                    if found < 3:
                        conv_rows[first + row, found] = first + above
                        found += 1
            for missing in range(3 - found):  # from the newest row of the request's state on
                conv_rows[first + row, found + missing] = size + 3 * tree + 2 - missing
    return tree_rows, row_places, ancestors, conv_rows
