"""P(accept): read from tables as written, corrected by what is verified, and what children are foreseen to bring."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import TUNING, random_acceptance

from echo_trt.speculation.goodput.learner.sources import SourceLearner
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED, KNOTS, Acceptance
from echo_trt.speculation.sources import BOTH, DRAFT, LOOKUP, SOURCES


def read(table: np.ndarray, source: int, depth: int, x: float) -> float:
    """On the straight line in sqrt(x) between the two knots around x; below the last row, the last row."""
    row = table[source][min(depth, len(table[source])) - 1]
    indices = [i / (KNOTS - 1) for i in range(KNOTS)]
    for i in range(KNOTS - 1):
        if indices[i] <= x**0.5 <= indices[i + 1]:
            share = (x**0.5 - indices[i]) / (indices[i + 1] - indices[i])
            return row[i] * (1 - share) + row[i + 1] * share
    raise AssertionError(x)


def ask(model: Acceptance, source: int, depth: int, x: float) -> float:
    score = np.log(np.array([x]))
    return float(model.probability(np.array([source]), np.array([depth]), score)[0])


@given(st.integers(0, 99), st.integers(0, 2), st.integers(1, 5), st.floats(1e-9, 1.0))
def test_tables_are_read_on_straight_lines(seed, source, depth, x):
    model = random_acceptance(seed)
    assert ask(model, source, depth, x) == pytest.approx(read(model.table, source, depth, x), abs=1e-9)


@given(st.floats(0.2, 2.0), st.floats(-3, 3), st.floats(1e-3, 1.0))
def test_slope_and_bias_change_the_log_odds_of_their_source_alone(slope, bias, x):
    model, before = random_acceptance(2), random_acceptance(2)
    model.slope[LOOKUP], model.bias[LOOKUP, 0] = slope, bias
    for source in (DRAFT, BOTH):
        assert ask(model, source, 1, x) == ask(before, source, 1, x)
    assert ask(model, LOOKUP, 2, x) == pytest.approx(in_odds(ask(before, LOOKUP, 2, x), slope, 0.0), rel=1e-6)
    assert ask(model, LOOKUP, 1, x) == pytest.approx(in_odds(ask(before, LOOKUP, 1, x), slope, bias), rel=1e-6)


def test_uncalibrated_the_draft_is_trusted_less_than_it_trusts_itself():
    model = Acceptance.uncalibrated(4)
    for x in (0.01, 0.25, 1.0):
        for source in range(len(CALIBRATED)):
            assert ask(model, source, 3, x) == pytest.approx(in_odds(min(0.999 * x, 0.999), 0.5, -0.2), rel=0.02)
    assert model.children.shape[0] == len(model.forecast(9, TUNING.horizon).child_shares) == 4
    assert (np.diff(model.children, axis=2) >= 0).all()
    assert (np.diff(model.children, axis=1) <= 0).all()


# -- what is learnt while it runs ------------------------------------------------------------------------------------


def in_odds(p: float, slope: float, bias: float) -> float:
    return 1 / (1 + (p / (1 - p)) ** -slope * np.exp(-bias))


def stream(learner: SourceLearner, slope: float, bias: float, source: int, iterations: int, seed: int = 0) -> None:
    """Verify nodes whose real odds are the table's, with ``slope`` and ``bias``."""
    rng, table = np.random.default_rng(seed), random_acceptance(3)
    for _ in range(iterations):
        scores = np.log(rng.uniform(0.05, 0.95, 12))
        sources, depths = np.full(12, source), rng.integers(1, 4, 12)
        real = in_odds(table.probability(sources, depths, scores), slope, bias)
        thought = learner.acceptance.probability(sources, depths, scores)
        learner.observe(sources, depths, scores, thought, (rng.random(12) < real).astype(float))


@pytest.mark.parametrize(("slope", "bias"), [(1.0, -1.5), (1.0, 0.0), (0.5, 0.5), (1.5, 0.7)])
def test_a_fit_finds_what_the_table_is_wrong_by(slope, bias):
    model, table = random_acceptance(3), random_acceptance(3)
    stream(SourceLearner(model, TUNING), slope, bias, DRAFT, 300)
    for depth in (1, 2, 3):
        for x in (0.2, 0.5, 0.9):
            assert ask(model, DRAFT, depth, x) == pytest.approx(
                in_odds(ask(table, DRAFT, depth, x), slope, bias), abs=0.1
            )
            assert ask(model, LOOKUP, depth, x) == ask(table, LOOKUP, depth, x)


def test_a_source_that_is_never_right_is_dropped_within_200_tries_and_tried_again_much_later():
    model = random_acceptance(5)
    learner = SourceLearner(model, TUNING)
    boast, depth, score = np.full(4, 0.9), np.ones(4, np.int64), np.zeros(4)
    for _ in range(50):
        learner.observe(np.full(4, LOOKUP), depth, score, boast, np.zeros(4))
    assert ask(model, LOOKUP, 1, 1.0) < 0.05
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0)
    rested = 0
    while ask(model, LOOKUP, 1, 1.0) < 0.3:
        learner.observe(*nothing)
        rested += 1
    assert 1000 < rested < 50_000


def test_one_verification_moves_little_and_in_the_right_direction():
    model = random_acceptance(5)
    learner = SourceLearner(model, TUNING)
    many, depth, score = np.full(64, BOTH), np.ones(64, np.int64), np.full(64, np.log(0.5))
    before = ask(model, BOTH, 1, 0.5)
    learner.observe(many[:1], depth[:1], score[:1], np.array([0.5]), np.zeros(1))
    assert before - 0.15 < ask(model, BOTH, 1, 0.5) <= before
    learner.observe(many, depth, score, np.full(64, 0.5), np.ones(64))
    assert ask(model, BOTH, 1, 0.5) > before
    none = dict.fromkeys(SOURCES, 0)
    assert learner.totals() == {
        "expected": {**none, "both": pytest.approx(32.5)},
        "accepted": {**none, "both": 64},
        "silent": none,
    }


def test_minutes_in_which_nothing_of_a_source_is_accepted_are_counted():
    learner = SourceLearner(random_acceptance(5), TUNING)
    depth, score, p = np.ones(40, np.int64), np.full(40, -1.0), np.full(40, 0.4)
    for minute in range(3):
        learner.observe(np.full(40, DRAFT), depth, score, p, np.zeros(40))
        learner.observe(np.full(40, BOTH), depth, score, p, np.ones(40) * (minute == 1))
        learner.observe(np.full(20, LOOKUP), depth[:20], score[:20], p[:20], np.zeros(20))
        learner.elapsed(31)
        learner.elapsed(31)
    silent = learner.totals()["silent"]
    assert {source: minutes for source, minutes in silent.items() if minutes} == {"head": 3, "both": 2}


def test_a_forecast_of_many_levels_does_not_promise_that_sure_texts_stay_sure():
    """A level adds what it adds below a mean path, times what its parent's certainty says of its children."""
    children = np.tile([0.1, 0.5, 0.9], (6, 1, 1))
    model = Acceptance(np.zeros((3, 6, KNOTS)), children)
    expected = [0.5, np.mean(children[0, 0] ** 2)]
    expected += [expected[1] * 0.5**level for level in range(1, 5)]
    assert np.diff(model.forecast(1, 6).added_tokens[0], prepend=0.0) == pytest.approx(expected)
