import numpy as np
from hypothesis import given
from hypothesis import strategies as st
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
