"""What the policy remembers: who fell behind, who was not drafted for, and what was gained."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import TUNING

from echo_trt.speculation.goodput.learner.requests import History

ALL, SECONDS = np.arange(4), 0.01


def run(history: History, progress: list[float], iterations: int, slots: np.ndarray = ALL, plain: float = 4.0) -> None:
    """``plain``: tokens that plain decoding would have committed in an iteration's time."""
    for _ in range(iterations):
        history.observe(slots, np.array(progress, float), SECONDS)
        history.spent(float(np.sum(progress)), plain, 0.001)


# -- weights -------------------------------------------------------------------------------------------------------


def test_those_behind_weigh_more_those_ahead_less():
    history = History(4, TUNING)
    assert history.weights(ALL).tolist() == [1, 1, 1, 1]
    run(history, [1, 2, 3, 2], 200)
    slow, mean, fast, _ = history.weights(ALL)
    assert slow > 1.1 > mean > 0.98 > fast
    assert history.weights(np.array([2, 0])) == pytest.approx([1 / 1.5**0.25, 1 * 2**0.25], rel=0.01)


@given(st.lists(st.integers(0, 60), min_size=4, max_size=4), st.integers(1, 400))
def test_weights_stay_within_their_limits(progress, iterations):
    history = History(4, TUNING)
    run(history, progress, min(iterations, 60))
    weights = history.weights(ALL)
    assert ((weights >= 0.8) & (weights <= 1.25)).all()
    order = np.argsort(progress, kind="stable")
    assert (np.diff(weights[order]) <= 1e-12).all()


def test_only_the_asked_slots_are_compared():
    history = History(4, TUNING)
    run(history, [1, 5, 5, 1], 100)
    assert history.weights(np.array([1, 2])) == pytest.approx([1, 1])
    assert history.weights(ALL[:0]).tolist() == []


# -- speedup -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(1, 8), st.floats(1e-3, 100.0)), max_size=30))
def test_speedup_is_never_below_one(iterations):
    history = History(4, TUNING)
    for tokens, plain in iterations:
        run(history, [tokens] * 4, 1, plain=plain)
        assert history.speedup >= 1


def test_speedup_is_tokens_over_those_of_plain_decoding_in_the_same_time():
    history = History(4, TUNING)
    assert history.speedup == 1
    # 4 requests, 3 tokens each, in twice the time of a plain iteration
    run(history, [3, 3, 3, 3], 300, plain=8.0)
    assert history.speedup == pytest.approx(1.5, rel=0.01)
    run(history, [1, 1, 1, 1], 300, plain=8.0)
    assert history.speedup == 1
    run(history, [2, 2, 2, 2], 300)
    assert history.speedup == pytest.approx(2, rel=0.01)


def test_a_fresh_request_begins_with_the_mean_progress():
    history = History(4, TUNING)
    run(history, [1, 4, 4, 4], 200)
    history.forget(0)
    assert 1 <= history.weights(ALL)[0] < 1.05


# -- exploration -------------------------------------------------------------------------------------------------------


def test_who_waited_longest_is_drafted_for_first():
    history, slots = History(6, TUNING), np.array([5, 1, 3])
    run(history, [1, 1, 1], 1000, slots=slots)
    for waited in ([5, 1, 3], [5, 3], [5]):
        history.drafted(np.array(waited), np.zeros(0, np.int64))
    assert history.explore(np.array([0, 1, 2]), slots, np.full(3, 0.01)).tolist() == [0]
    run(history, [1, 1, 1], 1000, slots=slots)
    history.drafted(np.array([5]), np.array([5]))
    assert history.explore(np.array([0, 1, 2]), slots, np.full(3, 0.01)).tolist() == [2]


@given(st.floats(1e-4, 0.05))
def test_exploration_waits_for_its_credit(cost):
    history = History(4, TUNING)
    spent = 0.0
    for _ in range(400):
        history.drafted(ALL, ALL[:0])
        if len(history.explore(ALL, ALL, np.full(len(ALL), cost))):
            spent += cost
        run(history, [1, 1, 1, 1], 1)
    assert spent <= 0.01 * 400 * SECONDS
    if cost < 0.2 * SECONDS:
        assert spent > 0
