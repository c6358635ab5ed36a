"""What the policy remembers: who fell behind, who drafts well, what was gained, and when to try again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.decoding.goodput.requests import History

ALL = np.arange(4)


def run(history: History, progress: list[float], iterations: int, slots: np.ndarray = ALL, **changes) -> None:
    told = {"expected": float(np.sum(progress)), "seconds": 0.01, "host": 0.001, "plain": 0.01, "prompts": False}
    for _ in range(iterations):
        history.observe(slots, np.array(progress, float), **{**told, **changes})


# -- weights -------------------------------------------------------------------------------------------------------


def test_those_behind_weigh_more_those_ahead_less():
    history = History(4)
    assert history.weights(ALL).tolist() == [1, 1, 1, 1]
    run(history, [1, 2, 3, 2], 200)
    slow, mean, fast, _ = history.weights(ALL)
    assert slow > 1.1 > mean > 0.98 > fast
    assert history.weights(np.array([2, 0])) == pytest.approx([1 / 1.5**0.25, 1 * 2**0.25], rel=0.01)


@given(st.lists(st.integers(0, 60), min_size=4, max_size=4), st.integers(1, 400))
def test_weights_stay_within_their_limits(progress, iterations):
    history = History(4)
    run(history, progress, min(iterations, 60))
    weights = history.weights(ALL)
    assert ((weights >= 0.8) & (weights <= 1.25)).all()
    order = np.argsort(progress, kind="stable")
    assert (np.diff(weights[order]) <= 1e-12).all()


def test_only_the_asked_slots_are_compared():
    history = History(4)
    run(history, [1, 5, 5, 1], 100)
    assert history.weights(np.array([1, 2])) == pytest.approx([1, 1])
    assert history.weights(ALL[:0]).tolist() == []


# -- speedup -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(1, 8), st.floats(1e-3, 1.0)), max_size=30))
def test_speedup_is_never_below_one(iterations):
    history = History(4)
    for tokens, seconds in iterations:
        run(history, [tokens] * 4, 1, seconds=seconds)
        assert history.speedup >= 1


def test_speedup_is_tokens_over_those_of_plain_decoding_in_the_same_time():
    history = History(4)
    assert history.speedup == 1
    # 4 requests, 3 tokens each, in twice the time of a plain iteration
    run(history, [3, 3, 3, 3], 300, seconds=0.02)
    assert history.speedup == pytest.approx(1.5, rel=0.01)
    run(history, [1, 1, 1, 1], 300, seconds=0.02)
    assert history.speedup == 1
    run(history, [2, 2, 2, 2], 300)
    assert history.speedup == pytest.approx(2, rel=0.01)


def test_an_iteration_with_prompts_says_nothing_of_speed():
    history = History(4)
    run(history, [3, 3, 3, 3], 200)
    host = history.host_seconds
    assert host == pytest.approx(0.001, rel=0.01)
    run(history, [1, 1, 1, 1], 200, seconds=1.0, host=0.5, prompts=True)
    assert history.speedup == pytest.approx(3, rel=0.01)
    assert history.host_seconds == host
    run(history, [], 5, slots=ALL[:0], expected=0.0)
    assert history.speedup == pytest.approx(3, rel=0.01)


# -- promise -------------------------------------------------------------------------------------------------------


def test_promise_follows_what_was_drafted_and_fades_towards_the_mean():
    history = History(4)
    for _ in range(40):
        history.begin(ALL)
        history.drafted(np.array([0]), np.array([0.2]), usual=0.5)
        history.drafted(np.array([1]), np.array([0.6]), usual=0.5)
    assert history.promise[:2] == pytest.approx([0.4, 1.2], abs=0.06)
    left = history.promise.copy()
    for _ in range(30):
        history.begin(np.array([0, 1]))
    assert left[0] < history.promise[0] < history.promise[1] < left[1]
    assert history.promise[2] == left[2]  # it could not draft
    for _ in range(400):
        history.begin(np.array([0, 1]))
    assert history.promise[0] == pytest.approx(history.promise[1], abs=1e-3)


def test_a_fresh_request_begins_with_what_is_usual():
    history = History(4)
    for _ in range(200):
        history.begin(ALL)
        history.drafted(ALL, np.array([0.1, 0.6, 0.6, 0.6]), usual=0.5)
    run(history, [1, 4, 4, 4], 200)
    history.forget(0)
    assert history.promise[0] == pytest.approx(0.95, abs=0.05)  # the mean of all, in shares of what is usual
    assert history.promise[1] == pytest.approx(1.2, abs=0.05)
    weights = history.weights(ALL)
    assert 1 <= weights[0] < 1.05
    history.begin(ALL)
    run(history, [1, 1, 1, 1], 100, seconds=1.0)
    history._idle[:] = [0, 5, 3, 1]
    history.forget(1)
    assert history.probe(ALL, ALL, np.full(len(ALL), 1e-9)).tolist() == [2]


def test_a_calibration_that_expects_nothing_of_drafts_leaves_numbers():
    history = History(2)
    history.begin(np.arange(2))
    history.drafted(np.array([0]), np.array([0.0]), usual=0.0)
    assert np.isfinite(history.promise).all()


# -- probing -------------------------------------------------------------------------------------------------------


def test_who_waited_longest_is_probed_first():
    history, slots = History(6), np.array([5, 1, 3])
    run(history, [1, 1, 1], 1000, slots=slots, seconds=1.0)
    for waited in ([5, 1, 3], [5, 3], [5]):
        history.begin(np.array(waited))
    assert history.probe(np.array([0, 1, 2]), slots, np.full(3, 0.01)).tolist() == [0]
    run(history, [1, 1, 1], 1000, slots=slots, seconds=1.0)
    history.drafted(np.array([5]), np.array([0.5]), 0.5)
    assert history.probe(np.array([0, 1, 2]), slots, np.full(3, 0.01)).tolist() == [2]


@given(st.floats(1e-3, 0.1), st.floats(1e-4, 0.05))
def test_probes_wait_for_their_credit(iteration, cost):
    history = History(4)
    spent = 0.0
    for _ in range(400):
        history.begin(ALL)
        if len(history.probe(ALL, ALL, np.full(len(ALL), cost))):
            spent += cost
        run(history, [1, 1, 1, 1], 1, seconds=iteration)
    assert spent <= 0.01 * 400 * iteration
    if cost < 0.2 * iteration:
        assert spent > 0


def test_where_plans_are_plain_some_are_left_out_until_the_load_changes():
    history = History(4)

    def planned(speculates: bool, iterations: int, requests: int = 4) -> int:
        count = 0
        for _ in range(iterations):
            if not history.rests(requests):
                history.planned(speculates)
                count += 1
        return count

    assert planned(True, 50) == 50
    assert 100 / 9 < planned(False, 100) < 60
    assert planned(False, 90) in (10, 11)  # one in nine, at the longest
    assert not history.rests(3)
    assert not history.rests(4)  # a change of load is always looked at
    history.planned(False)
    assert [history.rests(4) for _ in range(9)] == [True] * 8 + [False]  # and what was known of this load still holds
    assert planned(False, 4, requests=3) == 4


def test_the_way_back_from_speculation_is_paid_by_it():
    """A plain iteration after one that speculated took longer, since its pass was of another size: time is dearer."""
    history = History(4)
    for _ in range(50):
        run(history, [2, 1, 1, 1], 1, seconds=0.0125)  # worth exactly what it takes
        run(history, [1] * 4, 1, seconds=0.013)
    assert history.caution > 1.5
    history = History(4)
    for _ in range(50):
        run(history, [2, 1, 1, 1], 1, seconds=0.0125)
        run(history, [1] * 4, 1)
        run(history, [1] * 4, 2, seconds=0.013)  # slow, but not on its way back
    assert history.caution == pytest.approx(1.0)
