"""The launch plan: every request's tokens have a tile, and the card is full where the work is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from super_tree_attention.kernel_plan import MAX_SPLITS, MIN_SPLIT_KEYS, plan

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
    assert made.split_keys >= MIN_SPLIT_KEYS


def test_one_long_context_fills_the_card():
    made = plan(64, 1, 1024, **QWEN3_8B)
    tiles, kv_heads, splits = made.grid
    assert 0.9 * 132 <= tiles * kv_heads * splits <= 132  # one wave
    assert splits * made.split_keys >= 32 * 1024
    assert made.rows == 128


def test_many_requests_are_not_split_but_one_that_is_much_longer_than_the_others():
    made = plan(512, 256, 256 * 33, **QWEN3_8B)
    assert made.rows == 16
    assert made.split_keys > 33 * 32
    assert made.num_splits > 1


def test_a_short_context_is_not_split():
    assert plan(1, 1, 4, **QWEN3_8B).num_splits == 1


@pytest.mark.parametrize(("capability", "rows"), [(80, 64), (89, 64), (90, 128), (100, 128), (120, 64)])
def test_the_largest_tile_depends_on_the_card(capability, rows):
    assert plan(512, 1, 512, **QWEN3_8B, compute_capability=capability).rows == rows
