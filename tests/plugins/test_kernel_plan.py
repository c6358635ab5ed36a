"""The launch plan: every request's tokens have a tile, and the card is full where the work is there."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echo_trt.backends.cuda.sizes import graph_sizes, size_for
from super_tree_attention.kernel_plan import MAX_SPLITS, plan, split_rows

GRAPH_SIZES = graph_sizes(128)  # of the recipe's batch
QWEN3_8B = {"kv_heads": 8, "group": 4}


@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=9),
    group=st.integers(1, 16),
    entries=st.integers(0, 4000),
    processors=st.integers(1, 200),
)
def test_tiles_hold_every_ragged_batch(counts, group, entries, processors):
    made = plan(sum(counts), len(counts), entries, 2, group, processors=processors)
    tokens = made.rows // group
    assert made.grid[0] >= sum(-(-count // tokens) for count in counts)
    assert 1 <= made.num_splits <= MAX_SPLITS


def test_many_requests_are_not_split_but_one_that_is_much_longer_than_the_others():
    made = plan(512, 256, 256 * 33, **QWEN3_8B)
    assert made.rows == 16
    assert made.wanted_splits == 1
    assert made.num_splits > 1


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@given(trees=st.integers(1, 128), nodes=st.integers(1, 64))
@example(trees=1, nodes=20)
@example(trees=5, nodes=20)
@example(trees=8, nodes=30)
@example(trees=8, nodes=60)
@example(trees=64, nodes=4)
def test_the_kv_of_a_tree_is_read_twice_at_most(trees, nodes, capability):
    """In both engines, whose operator plans a call by its padded size; every tile reads its request's whole past."""
    call = {"token_ids": range(trees * nodes), "logit_rows": range(trees * nodes), "past_lens": range(trees)}
    padded = size_for(call, GRAPH_SIZES) or (trees * nodes, trees * nodes, trees)
    for tokens, requests in ((trees * nodes, trees), (padded[0], padded[2])):
        made = plan(tokens, requests, requests * 64, **QWEN3_8B, compute_capability=capability)
        assert -(-nodes // (made.rows // QWEN3_8B["group"])) <= 2


@given(programs=st.integers(1, 3000), processors=st.integers(1, 600))
def test_no_fewer_splits_would_fill_the_waves(programs, processors):
    """By trying all counts in turn."""
    keys = 10**9
    made = plan(64 * programs, 1, keys // 32, 1, 1, rows=64, processors=processors)
    filled = (s for s in range(1, MAX_SPLITS) if 10 * programs * s >= 9 * -(-programs * s // processors) * processors)
    wanted = next(filled, MAX_SPLITS)
    assert made.wanted_splits == wanted


@given(
    tokens=st.integers(1, 3000),
    more=st.integers(0, 3000),
    requests=st.integers(1, 300),
    entries=st.integers(0, 90_000),
    heads=st.tuples(st.integers(1, 8), st.integers(1, 16)),
    processors=st.integers(1, 200),
)
def test_room_for_splits_of_the_largest_call_is_room_for_all(tokens, more, requests, entries, heads, processors):
    """Sizing reserves memory for the largest call alone, where fewer splits are planned than for smaller ones."""
    made = plan(tokens, requests, entries, *heads, processors=processors)
    rows = tokens * heads[0] * heads[1]
    assert rows * made.num_splits <= split_rows(tokens, heads[0] * heads[1])
    assert split_rows(tokens, heads[0] * heads[1]) <= split_rows(tokens + more, heads[0] * heads[1])


def test_a_longer_table_changes_no_plan_so_that_it_may_be_padded():
    for tokens, requests in ((1, 1), (64, 1), (64, 8), (250, 64), (512, 256)):
        plans = {plan(tokens, requests, requests * blocks, **QWEN3_8B) for blocks in (128, 300, 1280)}
        assert len(plans) == 1
