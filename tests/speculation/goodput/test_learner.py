"""What the policy remembers: who fell behind, who was not drafted for, and what was gained."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import TUNING

from echo_trt.speculation.goodput.learner.learner import History

ALL, SECONDS = np.arange(4), 0.01


def run(history: History, progress: list[float], iterations: int, slots: np.ndarray = ALL, plain: float = 4.0) -> None:
    """``plain``: tokens that plain decoding would have committed in an iteration's time."""
    for _ in range(iterations):
        history.observe(slots, np.array(progress, float), SECONDS)
        history.spent(float(np.sum(progress)), plain, 0.001)


# -- weights -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), min_size=4, max_size=4), st.integers(1, 400))
def test_weights_stay_within_their_limits(progress, iterations):
    history = History(4, TUNING)
    run(history, progress, min(iterations, 60))
    weights = history.weights(ALL)
    assert ((weights >= 0.8) & (weights <= 1.25)).all()
    order = np.argsort(progress, kind="stable")
    assert (np.diff(weights[order]) <= 1e-12).all()


# -- speedup -------------------------------------------------------------------------------------------------------


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
