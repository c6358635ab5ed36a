"""Padded calls against the packed ones they come from, row by row: what each token is, sees, writes and gives back."""

import numpy as np
import pytest

from echo_trt.backends.padded import CALL_TOKENS, SlotLayout, split
from echo_trt.speculation.pack import ForwardBatch, pack

SLOTS, BLOCKS = 7, 3
LAYOUT = SlotLayout(SLOTS, BLOCKS, 40)


def packed(slots, past, counts, mask=None, layout=LAYOUT) -> ForwardBatch:
    slots, past, counts = np.array(slots), np.array(past), np.array(counts)
    total = counts.sum()
    table = np.arange(layout.slots * layout.blocks).reshape(layout.slots, -1)[slots]
    requested = np.flatnonzero(np.random.default_rng(total).integers(0, 2, total))
    return pack(100 + np.arange(total), 500 + np.arange(total), past, counts, table, requested, mask)


def sizes(call: ForwardBatch, layout: SlotLayout, **limits: int) -> list[list[int]]:
    return [sorted(part.counts.tolist()) for part in split(call, layout, **limits)]


def test_a_long_chunk_is_alone_and_what_is_alike_together():
    layout = SlotLayout(SLOTS, 20, 300)
    decoding = packed(range(6), [9] * 6, [5, 1, 4, 3, 1, 2], layout=layout)
    assert sizes(decoding, layout) == [[1, 1, 2, 3, 4, 5]]
    mixed = packed(range(7), [9] * 7, [5, 1, 4, 256, 1, 1, 2], layout=layout)
    assert sizes(mixed, layout) == [[1, 1, 1, 2, 4, 5], [256]]
    assert sizes(packed([3], [0], [256], layout=layout), layout) == [[256]]
    # Two chunks side by side are one call as long as their padding is less than what a call costs.
    for short, parts in ((256 - CALL_TOKENS + 1, 1), (256 - CALL_TOKENS - 1, 2)):
        assert len(split(packed([3, 4], [0, 0], [256, short], layout=layout), layout)) == parts


def test_what_is_more_than_fits_goes_in_pieces_in_order():
    layout = SlotLayout(SLOTS, BLOCKS, 20)
    parts = split(packed([4, 2], [3, 5], [50, 2], layout=layout), layout)
    alone = [(int(p.starts[0]), int(p.counts[0])) for p in parts if p.requests.tolist() == [0]]
    assert alone == [(0, 20), (20, 20), (40, 10)]
    assert sizes(packed([4, 2], [3, 5], [9, 8], layout=layout), layout, together=8) == [[8], [9]]


def test_what_the_caches_cannot_hold_is_an_error():
    layout = SlotLayout(SLOTS, BLOCKS, 4)
    chain = np.tri(5, dtype=np.uint8).ravel(), np.array([0, 25])
    with pytest.raises(ValueError, match=r"a tree of 5 nodes.* 4 new tokens"):
        split(packed([1], [0], [5], chain, layout), layout)
    scattered = pack(np.zeros(1), np.zeros(1), np.zeros(1, int), np.ones(1, int), np.array([[4]]), np.zeros(1))
    with pytest.raises(ValueError, match="linear slots"):
        split(scattered, layout)
