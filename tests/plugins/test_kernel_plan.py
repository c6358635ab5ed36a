"""The launch plan: every request's tokens have a tile, and the card is full where the work is there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from super_tree_attention.kernel_plan import MAX_SPLITS, Whole, plan, split_rows

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


@pytest.mark.parametrize(("capability", "rows"), [(80, 64), (89, 64), (90, 128), (100, 128), (120, 64)])
def test_the_largest_tile_depends_on_the_card(capability, rows):
    assert plan(512, 1, 512, **QWEN3_8B, compute_capability=capability).rows == rows


class Symbol:
    """A number of which TensorRT's symbols' operations alone are known, with the symbol on the left."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return Symbol(self.value + _value(other))

    def __sub__(self, other):
        return Symbol(self.value - _value(other))

    def __mul__(self, other):
        return Symbol(self.value * _value(other))

    def __floordiv__(self, other):
        return Symbol(self.value // _value(other))

    def __rmul__(self, other):
        raise AssertionError("a symbol stands on the left")

    def __bool__(self):
        raise AssertionError("a symbol is neither true nor false")


class Symbols:
    @staticmethod
    def cdiv(a, b):
        return Symbol(Whole.cdiv(a.value, _value(b)))

    @staticmethod
    def min(a, b):
        return Symbol(min(a.value, _value(b)))

    @staticmethod
    def max(a, b):
        return Symbol(max(a.value, _value(b)))


def _value(number):
    return number.value if isinstance(number, Symbol) else number


@given(
    sizes=st.tuples(st.integers(1, 9000), st.integers(1, 300), st.integers(0, 9000), st.integers(1, 16)),
    kv_heads=st.integers(1, 8),
    processors=st.integers(1, 200),
    capability=st.sampled_from([80, 90]),
)
def test_a_plan_of_symbols_is_the_plan_of_their_numbers(sizes, kv_heads, processors, capability):
    tokens, requests, entries, group = sizes
    card = {"processors": processors, "compute_capability": capability}
    made = plan(tokens, requests, entries, kv_heads, group, **card)
    symbols = plan(*map(Symbol, sizes[:3]), kv_heads, Symbol(group), **card, ops=Symbols)
    assert made.grid == tuple(map(_value, symbols.grid))
    assert (made.rows, made.wanted_splits) == (symbols.rows.value, symbols.wanted_splits.value)
    assert split_rows(tokens, group) == split_rows(Symbol(tokens), Symbol(group), Symbols).value


@given(programs=st.integers(1, 3000), processors=st.integers(1, 600))
def test_no_fewer_splits_would_fill_the_waves(programs, processors):
    """By trying all counts in turn."""
    keys = 10**9
    made = plan(64 * programs, 1, keys // 32, 1, 1, rows=64, processors=processors)
    filled = (
        s for s in range(1, MAX_SPLITS) if 10 * programs * s >= 9 * Whole.cdiv(programs * s, processors) * processors
    )
    wanted = next(filled, MAX_SPLITS)
    assert made.wanted_splits == wanted


@given(
    tokens=st.integers(1, 3000),
    more=st.integers(0, 3000),
    requests=st.integers(1, 300),
    entries=st.integers(0, 90_000),
    heads=st.tuples(st.integers(1, 8), st.integers(1, 16)),
    processors=st.integers(1, 200),
    max_rows=st.sampled_from([64, 128]),
)
def test_room_for_splits_of_the_largest_call_is_room_for_all(
    tokens, more, requests, entries, heads, processors, max_rows
):
    """TensorRT may reserve memory for the largest call alone, where fewer splits are planned than for smaller ones."""
    made = plan(tokens, requests, entries, *heads, processors=processors, max_rows=max_rows)
    assert made.rows <= max_rows
    rows = tokens * heads[0] * heads[1]
    assert rows * made.num_splits <= split_rows(tokens, heads[0] * heads[1])
    assert split_rows(tokens, heads[0] * heads[1]) <= split_rows(tokens + more, heads[0] * heads[1])


def test_a_longer_table_changes_no_plan_so_that_it_may_be_padded():
    for tokens, requests in ((1, 1), (64, 1), (64, 8), (250, 64), (512, 256)):
        plans = {plan(tokens, requests, requests * blocks, **QWEN3_8B) for blocks in (128, 300, 1280)}
        assert len(plans) == 1
