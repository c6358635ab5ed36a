"""Slots: blocks are never lost or shared, and text is appended as one would by hand, request by request."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from echo_trt.engine.batch import InputBatch, blocks_for
from echo_trt.speculation.pack import BLOCK

COUNT, CONTEXT, RESERVE = 5, 100, 12


class Blocks(RuleBasedStateMachine):
    """Hold and release in any order."""

    @initialize(blocks=st.integers(1, COUNT * 4 + 3))
    def begin(self, blocks):
        self.batch, self.blocks = InputBatch(COUNT, CONTEXT, RESERVE, blocks), blocks
        self.lengths = [0] * COUNT

    @rule(wanted=st.dictionaries(st.integers(0, COUNT - 1), st.integers(1, CONTEXT + RESERVE), min_size=1))
    def hold(self, wanted):
        before, table, held = self.batch.free_blocks, self.batch.block_table.copy(), self.batch.blocks_held.copy()
        needed = sum(max(blocks_for(n) - int(held[slot]), 0) for slot, n in wanted.items())
        enough = self.batch.hold(np.array(list(wanted)), np.array(list(wanted.values())))
        assert enough == (needed <= before)
        assert self.batch.free_blocks == before - needed * enough
        for slot in range(COUNT):  # what was held stays where it is
            assert (self.batch.block_table[slot, : held[slot]] == table[slot, : held[slot]]).all()
        if enough:
            self.lengths = [max(n, wanted.get(slot, 0)) for slot, n in enumerate(self.lengths)]

    @rule(slot=st.integers(0, COUNT - 1))
    def release(self, slot):
        self.batch.release(slot)
        self.lengths[slot] = 0

    @invariant()
    def every_block_has_one_place(self):
        batch = self.batch
        held = [batch.block_table[slot, : batch.blocks_held[slot]] for slot in range(COUNT)]
        free = batch._free[: batch.free_blocks]
        assert sorted(np.concatenate((*held, free)).tolist()) == list(range(self.blocks))
        assert batch.blocks_held.tolist() == [blocks_for(n) for n in self.lengths]

    @invariant()
    def rows_are_distinct(self):
        batch = self.batch
        slots = np.repeat(np.arange(COUNT), self.lengths)
        rows = batch.rows(slots, np.concatenate([np.arange(n) for n in self.lengths]))
        assert len(set(rows.tolist())) == len(rows)
        assert ((rows >= 0) & (rows < self.blocks * BLOCK)).all()


TestBlocks = Blocks.TestCase


class LinearBlocks(Blocks):
    """The same where each slot has its own blocks: there is always room, and always in the same place."""

    @initialize()
    def begin(self):
        self.batch = InputBatch(COUNT, CONTEXT, RESERVE)
        self.blocks = COUNT * blocks_for(CONTEXT + RESERVE)
        self.lengths = [0] * COUNT

    @invariant()
    def every_block_has_one_place(self):
        batch = self.batch
        assert batch.block_table.tolist() == np.arange(self.blocks).reshape(COUNT, -1).tolist()
        assert batch.blocks_held.tolist() == [blocks_for(n) for n in self.lengths]
        assert batch.free_blocks == self.blocks - batch.blocks_held.sum()


TestLinearBlocks = LinearBlocks.TestCase

tokens = st.integers(0, 9)
step_output = st.tuples(
    st.lists(tokens, min_size=1, max_size=6),  # emitted
    st.lists(tokens, max_size=3),  # stop tokens
    st.integers(1, 20),  # length so far
    st.integers(1, 8),  # tokens that its limit still allows
)


@given(st.lists(step_output, min_size=1, max_size=COUNT), st.randoms())
def test_append_equals_one_by_one(emissions, random):
    batch = InputBatch(COUNT, CONTEXT, RESERVE, 1)
    slots = random.sample(range(COUNT), len(emissions))
    for slot, (_, stops, length, max_draft_len) in zip(slots, emissions, strict=True):
        batch.tokens[slot, :length] = 77
        batch.length[slot], batch.limit[slot] = length, length + max_draft_len
        batch.stop_tokens[slot, : len(stops)] = stops
    emitted = [step_output[0] for step_output in emissions]
    counts = np.array([len(new) for new in emitted])
    kept, stopped, full = batch.append(np.array(slots), counts, np.concatenate(emitted))

    for i, (slot, (new, stops, length, max_draft_len)) in enumerate(zip(slots, emissions, strict=True)):
        history = []
        for token in new:
            history.append(token)
            if token in stops or len(history) == max_draft_len:
                break
        assert kept[i] == len(history)
        assert stopped[i] == (history[-1] in stops)
        assert full[i] == (len(history) == max_draft_len)
        assert batch.length[slot] == length + len(history)
        text = batch.tokens[slot].tolist()
        assert text == [77] * length + history + [0] * (CONTEXT - length - len(history))


def test_requests_are_served_oldest_first():
    batch = InputBatch(4, CONTEXT, RESERVE, 1)
    batch.active[:] = [True, True, True, False]
    batch.admitted[:] = [5, 2, 9, 1]
    batch.length[:], batch.committed[:] = 10, [9, 9, 4, 9]
    assert batch.decoding().tolist() == [1, 0]
    assert batch.prefilling().tolist() == [2]
    batch.committed[:] = 0
    assert batch.decoding().tolist() == []
    assert batch.prefilling().tolist() == [1, 0, 2]
