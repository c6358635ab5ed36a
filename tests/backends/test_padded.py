"""Padded calls against the packed ones they come from, row by row: what each token is, sees, writes and gives back."""

import numpy as np
import pytest
from forests import super_trees
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.backends.padded import CALL_TOKENS, SlotLayout, pad, split, unpad
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.super_tree import ancestor_mask

SLOTS, BLOCKS = 7, 3
LAYOUT = SlotLayout(SLOTS, BLOCKS, 40)


def packed(slots, past, counts, mask=None, layout=LAYOUT) -> ForwardBatch:
    slots, past, counts = np.array(slots), np.array(past), np.array(counts)
    total = counts.sum()
    table = np.arange(layout.slots * layout.blocks).reshape(layout.slots, -1)[slots]
    requested = np.flatnonzero(np.random.default_rng(total).integers(0, 2, total))
    return pack(100 + np.arange(total), 500 + np.arange(total), past, counts, table, requested, mask)


@st.composite
def calls(draw) -> tuple[ForwardBatch, SlotLayout]:
    """Trees, with a mask or without, and prompt chunks, in slots of any order."""
    tree, _ = draw(super_trees(max_requests=3, max_nodes=9).map(lambda t: t.sorted_by_request(np.arange(len(t)))))
    counts = [*tree.sizes.tolist(), *draw(st.lists(st.integers(1, 60), max_size=3))]
    past = [draw(st.integers(0, BLOCKS * BLOCK - count)) for count in counts]
    slots = draw(st.permutations(range(SLOTS)))[: len(counts)]
    layout = SlotLayout(SLOTS, BLOCKS, draw(st.integers(max(tree.sizes), 64)))
    return packed(slots, past, counts, ancestor_mask(tree) if draw(st.booleans()) else None, layout), layout


def seen_by(call: ForwardBatch) -> list[set[tuple[int, int]]]:
    """Return the (slot, cache row) pairs that each packed row may attend to."""
    seen = []
    for i, past in enumerate(call.past_lens.tolist()):
        count = call.seq_begins[i + 1] - call.seq_begins[i]
        section = call.tree_mask[call.tree_mask_begins[i] : call.tree_mask_begins[i + 1]]
        mask = section.reshape(count, count) if len(section) else np.tri(count)
        slot = int(call.block_indices[call.block_begins[i]]) // BLOCKS
        seen += [{(slot, c) for c in [*range(past), *(past + np.flatnonzero(row)).tolist()]} for row in mask]
    return seen


@given(calls(), st.integers(1, SLOTS), st.integers(1, 12))
def test_every_token_is_computed_once_and_sees_what_it_should(drawn, batch, tokens):
    call, layout = drawn
    tokens = min(tokens, layout.spare)
    parts = [pad(call, part, layout, batch, tokens) for part in split(call, layout)]
    assert sorted(np.concatenate([part.rows for part in parts]).tolist()) == list(range(len(call.token_ids)))
    expected = seen_by(call)
    written = {(s, r) for s, past in zip(slots_of(call), call.past_lens, strict=True) for r in range(past)}
    for part in parts:
        size, width = part.token_ids.shape
        assert size >= batch
        assert width >= tokens
        assert part.tree_mask.shape == (size, width, width)
        assert np.flatnonzero(part.tree_mask.any(axis=2)).tolist() == sorted(part.padded_rows)  # the others are padding
        written |= {
            (part.first + b, part.past_lens[b] + t) for b, t in zip(*np.divmod(part.padded_rows, width), strict=True)
        }
        for row, index in zip(part.rows.tolist(), part.padded_rows.tolist(), strict=True):
            b, t = divmod(index, width)
            assert part.token_ids[b, t] == call.token_ids[row]
            assert part.positions[b, t] == call.positions[row]
            assert part.state_rows[b, t] == row
            past = int(part.past_lens[b])
            columns = [*range(past), *(past + np.flatnonzero(part.tree_mask[b, t])).tolist()]
            sees = {(part.first + b, c) for c in columns}
            assert sees == expected[row]
            assert sees <= written


def slots_of(call: ForwardBatch) -> list[int]:
    return (call.block_indices[call.block_begins[:-1]] // BLOCKS).tolist()


@given(calls(), st.integers(1, SLOTS), st.integers(1, 12))
def test_padding_is_written_where_nothing_is_kept(drawn, batch, tokens):
    call, layout = drawn
    lengths = dict(zip(slots_of(call), zip(call.past_lens, np.diff(call.seq_begins), strict=True), strict=True))
    for part in [pad(call, part, layout, batch, min(tokens, layout.spare)) for part in split(call, layout)]:
        size, width = part.token_ids.shape
        assert 0 <= part.first <= layout.slots - size
        assert (part.past_lens + width <= layout.rows).all()
        computed = set(part.padded_rows.tolist())
        for index in set(range(size * width)) - computed:
            b, t = divmod(index, width)
            row = part.past_lens[b] + t
            involved = any(b * width + other in computed for other in range(width))
            past, count = lengths[part.first + b] if involved else (BLOCKS * BLOCK, 0)
            assert row >= past + count or (count > layout.spare and row >= past)  # a later piece writes it again


@given(calls())
def test_outputs_come_back_in_packed_order(drawn):
    call, layout = drawn
    parts = [pad(call, part, layout, 2, 3) for part in split(call, layout)]
    outputs = [
        {"state": part.token_ids.reshape(-1, 1), "logits": part.token_ids.reshape(-1)[part.logit_rows][:, None]}
        for part in parts
    ]
    got = unpad(call, parts, outputs)
    assert got["state"][:, 0].tolist() == call.token_ids.tolist()
    assert got["logits"][:, 0].tolist() == call.token_ids[call.logit_rows].tolist()


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


def test_pool_rows_are_cache_rows():
    slots, rows = SlotLayout(SLOTS, BLOCKS, 9).slots_and_rows(np.array([0, 95, 96, 200]))
    assert slots.tolist() == [0, 0, 1, 2]
    assert rows.tolist() == [0, 95, 0, 8]
