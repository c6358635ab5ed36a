"""Packed calls as launches of the graph with the plugin: divided to fit, padded to few sizes."""

import numpy as np

from echo_trt.backends.cuda.sizes import CallBounds, graph_sizes
from echo_trt.backends.padded import SlotLayout
from echo_trt.backends.tensorrt.calls import CallLimits, linear_pieces, packed_pieces
from echo_trt.speculation.pack import pack


def packed_call(counts, past=0):
    counts = np.asarray(counts)
    table = np.arange(len(counts) * 8).reshape(len(counts), 8)
    total = counts.sum()
    return pack(np.arange(total), np.zeros(total), np.full(len(counts), past), counts, table, np.arange(0, total, 2))


def test_a_packed_call_in_pieces_is_the_whole_call():
    call = packed_call([3, 30, 1, 8, 8, 2], past=40)
    limits = CallLimits(batch=8, tokens=32, chunk=32, rows=32)
    total = len(call.token_ids)
    features = np.arange(20.0)[:, None]
    inputs = {"features": features, "hidden": np.arange(20.0, total)[:, None]}
    pieces = list(packed_pieces(call, inputs, limits, graph_sizes(8), CallBounds(8, 8)))
    assert len(pieces) > 1
    assert np.concatenate([p.rows for p in pieces]).tolist() == list(range(total))
    assert np.concatenate([p.requested for p in pieces]).tolist() == list(range(len(call.logit_rows)))
    for piece in pieces:
        arrays, count = piece.arrays, len(piece.rows)
        assert (arrays["token_ids"][:count] == call.token_ids[piece.rows]).all()
        states = np.concatenate((arrays["features"], arrays["hidden"]))
        if not piece.padded:
            assert (states[:, 0] == piece.rows).all()
        requested = call.logit_rows[piece.requested]
        assert (piece.rows[arrays["logit_rows"][: len(requested)]] == requested).all()
        requests = np.flatnonzero(np.isin(call.seq_begins[:-1], piece.rows))
        blocks = [call.block_indices[call.block_begins[r] : call.block_begins[r + 1]] for r in requests]
        assert (arrays["block_indices"][: sum(map(len, blocks))] == np.concatenate(blocks)).all()
        assert arrays["block_begins"][0] == arrays["seq_begins"][0] == 0
        assert arrays["tree_mask"].dtype == np.int32


def test_a_launch_asks_for_a_row_even_if_the_call_does_not():
    call = packed_call([3])
    call = pack(call.token_ids, call.positions, np.zeros(1, int), np.array([3]), np.zeros((1, 8)), np.zeros(0))
    (piece,) = packed_pieces(call, {}, CallLimits(8, 32, 32, 32), graph_sizes(8), CallBounds(8, 8))
    assert len(piece.arrays["logit_rows"]) >= 1
    assert len(piece.requested) == 0
    (piece,) = linear_pieces(call, {}, SlotLayout(2, 8, 16), CallLimits(2, 16, 16, 16))
    assert len(piece.arrays["logit_rows"]) >= 1
    assert len(piece.requested) == 0
