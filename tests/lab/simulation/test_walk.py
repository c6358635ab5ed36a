from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from synthetic import recorded

from echo_trt_lab.simulation.walk import Recording, Walk


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    batch=st.integers(1, 12),
    steps=st.lists(st.integers(1, 6), min_size=1, max_size=20),
)
def test_slots_stay_on_recorded_places_and_emit_no_more_than_is_left(lengths, batch, steps):
    recording = Recording(recorded(lengths, 2, 1, 1))
    walk = Walk(recording, batch, prompt=7)
    for count in steps:
        trees, positions = recording.trees, walk.positions
        assert (trees.request[positions] == walk.answer).all()
        assert (trees.index[positions] == walk.index).all()
        assert (walk.left == trees.left[positions]).all()
        assert walk.context.tolist() == (7 + walk.index - 1).tolist()
        left, answer = walk.left, walk.answer.copy()
        kept = walk.advance(np.full(batch, count))
        assert (kept.tokens == np.minimum(count, left)).all()
        assert (np.flatnonzero(count >= left) == kept.ended).all()
        assert (walk.index[kept.ended] == 1).all()
        going = np.setdiff1d(np.arange(batch), kept.ended)
        assert (walk.answer[going] == answer[going]).all()


def test_what_stands_before_each_slots_newest_token():
    recording = Recording(recorded([9, 6, 7], 2, 1, 1))
    walk, trees = Walk(recording, 5, 0), recording.trees
    for _ in range(12):
        for slot, (answer, index) in enumerate(zip(walk.answer, walk.index, strict=True)):
            begin = trees.answer_begins[answer]
            text = [-1, -1, -1, *trees.answers[begin : begin + index].tolist()]
            assert walk.roots[slot] == text[-1]
            assert walk.recent(3)[slot].tolist() == text[-4:-1]
        walk.advance(np.array([1, 2, 1, 3, 1]))


def test_answers_take_turns():
    recording = Recording(recorded([4, 4, 4, 4], 2, 1, 1))
    walk, seen = Walk(recording, 1, 0), []
    for _ in range(8):
        seen.append(int(walk.answer[0]))
        walk.advance(np.array([99]))
    assert seen == [*recording.answers, *recording.answers]


def test_more_slots_than_answers_begin_at_different_places():
    walk = Walk(Recording(recorded([50, 50], 2, 1, 1)), 20, 0)
    assert len(set(zip(walk.answer.tolist(), walk.index.tolist(), strict=True))) == 20


def test_recordings_that_cannot_be_walked():
    trees = recorded([5, 5], 2, 1, 1)
    with refused("2 tokens"):
        Recording(replace(trees, answers=trees.answers[:2], answer_begins=np.array([0, 1, 2])))
    with refused("token 1 of answer 1"):
        Recording(replace(trees, index=np.where((trees.request == 1) & (trees.index == 1), 2, trees.index)))
