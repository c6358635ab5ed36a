"""Slots: blocks are never lost or shared, and text is appended as one would by hand, request by request."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from echo_trt.decoding.pack import BLOCK
from echo_trt.runtime.slots import Slots, blocks_for

COUNT, CONTEXT, RESERVE = 5, 100, 12


class Blocks(RuleBasedStateMachine):
    """Hold and release in any order."""

    @initialize(blocks=st.integers(1, COUNT * 4 + 3))
    def begin(self, blocks):
        self.state, self.blocks = Slots(COUNT, CONTEXT, RESERVE, blocks), blocks
        self.lengths = [0] * COUNT

    @rule(wanted=st.dictionaries(st.integers(0, COUNT - 1), st.integers(1, CONTEXT + RESERVE), min_size=1))
    def hold(self, wanted):
        before, table, held = self.state.free_blocks, self.state.block_table.copy(), self.state.blocks_held.copy()
        needed = sum(max(blocks_for(n) - int(held[slot]), 0) for slot, n in wanted.items())
        enough = self.state.hold(np.array(list(wanted)), np.array(list(wanted.values())))
        assert enough == (needed <= before)
        assert self.state.free_blocks == before - needed * enough
        for slot in range(COUNT):  # what was held stays where it is
            assert (self.state.block_table[slot, : held[slot]] == table[slot, : held[slot]]).all()
        if enough:
            self.lengths = [max(n, wanted.get(slot, 0)) for slot, n in enumerate(self.lengths)]

    @rule(slot=st.integers(0, COUNT - 1))
    def release(self, slot):
        self.state.release(slot)
        self.lengths[slot] = 0

    @invariant()
    def every_block_has_one_place(self):
        state = self.state
        held = [state.block_table[slot, : state.blocks_held[slot]] for slot in range(COUNT)]
        free = state._free[: state.free_blocks]
        assert sorted(np.concatenate((*held, free)).tolist()) == list(range(self.blocks))
        assert state.blocks_held.tolist() == [blocks_for(n) for n in self.lengths]

    @invariant()
    def rows_are_distinct(self):
        state = self.state
        slots = np.repeat(np.arange(COUNT), self.lengths)
        rows = state.rows(slots, np.concatenate([np.arange(n) for n in self.lengths]))
        assert len(set(rows.tolist())) == len(rows)
        assert ((rows >= 0) & (rows < self.blocks * BLOCK)).all()


TestBlocks = Blocks.TestCase


class LinearBlocks(Blocks):
    """The same where each slot has its own blocks: there is always room, and always in the same place."""

    @initialize()
    def begin(self):
        self.state = Slots(COUNT, CONTEXT, RESERVE)
        self.blocks = COUNT * blocks_for(CONTEXT + RESERVE)
        self.lengths = [0] * COUNT

    @invariant()
    def every_block_has_one_place(self):
        state = self.state
        assert state.block_table.tolist() == np.arange(self.blocks).reshape(COUNT, -1).tolist()
        assert state.blocks_held.tolist() == [blocks_for(n) for n in self.lengths]
        assert state.free_blocks == self.blocks - state.blocks_held.sum()


TestLinearBlocks = LinearBlocks.TestCase

tokens = st.integers(0, 9)
emission = st.tuples(
    st.lists(tokens, min_size=1, max_size=6),  # emitted
    st.lists(tokens, max_size=3),  # stop tokens
    st.integers(1, 20),  # length so far
    st.integers(1, 8),  # tokens that its limit still allows
)


@given(st.lists(emission, min_size=1, max_size=COUNT), st.randoms())
def test_append_equals_one_by_one(emissions, random):
    state = Slots(COUNT, CONTEXT, RESERVE, 1)
    slots = random.sample(range(COUNT), len(emissions))
    for slot, (_, stops, length, room) in zip(slots, emissions, strict=True):
        state.tokens[slot, :length] = 77
        state.length[slot], state.limit[slot] = length, length + room
        state.stop_tokens[slot, : len(stops)] = stops
    emitted = [emission[0] for emission in emissions]
    counts = np.array([len(new) for new in emitted])
    kept, stopped, full = state.append(np.array(slots), counts, np.concatenate(emitted))

    for i, (slot, (new, stops, length, room)) in enumerate(zip(slots, emissions, strict=True)):
        said = []
        for token in new:
            said.append(token)
            if token in stops or len(said) == room:
                break
        assert kept[i] == len(said)
        assert stopped[i] == (said[-1] in stops)
        assert full[i] == (len(said) == room)
        assert state.length[slot] == length + len(said)
        text = state.tokens[slot].tolist()
        assert text == [77] * length + said + [0] * (CONTEXT - length - len(said))


def test_requests_are_served_oldest_first():
    state = Slots(4, CONTEXT, RESERVE, 1)
    state.active[:] = [True, True, True, False]
    state.admitted[:] = [5, 2, 9, 1]
    state.length[:], state.committed[:] = 10, [9, 9, 4, 9]
    assert state.decoding().tolist() == [1, 0]
    assert state.prefilling().tolist() == [2]
    state.committed[:] = 0
    assert state.decoding().tolist() == []
    assert state.prefilling().tolist() == [1, 0, 2]
