"""P(accept): read from tables as written, corrected by what is verified, and what children are foreseen to bring."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import random_acceptance

from echo_trt.decoding.goodput.acceptance import BOTH, CALIBRATED, HEAD, HORIZON, KNOTS, LOOKUP, Acceptance, knots

CHILDREN = np.array([[[0.2, 0.8], [0.1, 0.1]], [[0.5, 0.9], [0.0, 0.1]], [[0.4, 1.0], [0.2, 0.0]]])


def read(table: np.ndarray, source: int, depth: int, x: float) -> float:
    """On the straight line in sqrt(x) between the two knots around x; below the last row, the last row."""
    row = table[source][min(depth, len(table[source])) - 1]
    places = [i / (KNOTS - 1) for i in range(KNOTS)]
    for i in range(KNOTS - 1):
        if places[i] <= x**0.5 <= places[i + 1]:
            share = (x**0.5 - places[i]) / (places[i + 1] - places[i])
            return row[i] * (1 - share) + row[i + 1] * share
    raise AssertionError(x)


def ask(model: Acceptance, source: int, depth: int, x: float) -> float:
    score = np.log(np.array([x]))
    return float(model.probability(np.array([source]), np.array([depth]), score)[0])


@given(st.integers(0, 99), st.integers(0, 2), st.integers(1, 5), st.floats(1e-9, 1.0))
def test_tables_are_read_on_straight_lines(seed, source, depth, x):
    model = random_acceptance(seed)
    assert ask(model, source, depth, x) == pytest.approx(read(model.table, source, depth, x), abs=1e-9)


def test_at_knots_tables_say_what_they_hold():
    model = random_acceptance(0)
    for place in (0, 1, 17, 63, 64):
        with np.errstate(divide="ignore"):
            assert ask(model, BOTH, 2, knots()[place]) == pytest.approx(model.table[BOTH, 1, place])
    assert knots()[0] == 0
    assert knots()[-1] == 1
    assert len(knots()) == KNOTS


def test_many_nodes_are_asked_at_once():
    model = random_acceptance(1)
    rng = np.random.default_rng(1)
    source, depth, x = rng.integers(0, 3, 50), rng.integers(1, 6, 50), rng.uniform(0, 1, 50)
    together = model.probability(source.astype(np.int8), depth, np.log(x).astype(np.float32))
    assert together == pytest.approx([ask(model, *each) for each in zip(source, depth, x, strict=True)], abs=1e-5)


@given(st.floats(-1.5, 1.5), st.floats(1e-4, 1.0))
def test_drift_shifts_the_odds_of_its_source_alone(drift, x):
    model, before = random_acceptance(2), random_acceptance(2)
    model.drift[LOOKUP] = drift
    for source in (HEAD, BOTH):
        assert ask(model, source, 1, x) == ask(before, source, 1, x)
    p, q = ask(before, LOOKUP, 1, x), ask(model, LOOKUP, 1, x)
    assert q / (1 - q) == pytest.approx(p / (1 - p) * np.exp(drift), rel=1e-6)


def test_uncalibrated_takes_the_draft_at_its_word():
    model = Acceptance.uncalibrated(4)
    for x in (knots()[5], 0.25, 1.0):
        for source in range(len(CALIBRATED)):
            assert ask(model, source, 3, x) == pytest.approx(0.999 * x, abs=1e-3)
    assert model.children.shape[0] == len(model.forecast(9).below) == 4
    assert (np.diff(model.children, axis=2) >= 0).all()
    assert (np.diff(model.children, axis=1) <= 0).all()


# -- drift -----------------------------------------------------------------------------------------------------------


def stream(model: Acceptance, shift: float, source: int, iterations: int, seed: int = 0) -> None:
    """Verify nodes whose real odds are the table's times e^shift."""
    rng = np.random.default_rng(seed)
    for _ in range(iterations):
        scores = np.log(rng.uniform(0.05, 0.95, 12))
        sources, depths = np.full(12, source), rng.integers(1, 4, 12)
        thought = model.probability(sources, depths, scores)
        odds = model.table[source, np.minimum(depths, 3) - 1]
        known = np.array([np.interp(np.exp(s / 2), np.sqrt(knots()), row) for s, row in zip(scores, odds, strict=True)])
        real = known * np.exp(shift) / (1 - known + known * np.exp(shift))
        model.observe(sources, thought, (rng.random(12) < real).astype(float))


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.7])
def test_drift_finds_what_the_table_is_wrong_by(shift):
    model = random_acceptance(3)
    stream(model, shift, HEAD, 1500)
    assert model.drift[HEAD] == pytest.approx(shift, abs=0.25)
    assert model.drift[LOOKUP] == model.drift[BOTH] == 0


@pytest.mark.parametrize("shift", [-4.0, 4.0])
def test_drift_is_bounded(shift):
    model = random_acceptance(4)
    stream(model, shift, LOOKUP, 1500)
    assert model.drift[LOOKUP] == pytest.approx(1.5 * np.sign(shift), abs=0.1)
    assert abs(model.drift[LOOKUP]) <= 1.5


def test_one_verification_moves_little_and_in_the_right_direction():
    model = random_acceptance(5)
    many = np.full(400, BOTH)
    model.observe(many, np.full(400, 0.5), np.ones(400))
    assert 0 < model.drift[BOTH] < 0.25
    up = model.drift[BOTH]
    model.observe(many[:1], np.array([0.5]), np.zeros(1))
    assert 0 < model.drift[BOTH] < up
    assert model.totals() == {
        "expected": {"head": 0, "lookup": 0, "both": pytest.approx(200.5), "ngram": 0, "grammar": 0},
        "accepted": {"head": 0, "lookup": 0, "both": 400, "ngram": 0, "grammar": 0},
    }
    model.observe(many[:0], np.zeros(0), np.zeros(0))
    assert model.expected.tolist() == [0, 0, 200.5, 0, 0]


# -- children --------------------------------------------------------------------------------------------------------


def test_below_a_node_stand_its_children_and_those_of_its_best_child():
    model = Acceptance(random_acceptance(0).table, CHILDREN)
    assert [len(levels) for levels in model.forecast(9).below] == [min(HORIZON, 3 - depth) for depth in range(3)]
    for depth, levels in enumerate(model.forecast(9).below):
        assert levels.shape == (min(HORIZON, 3 - depth), 2, 2)
        for quantile in range(2):
            above = 1.0
            for level in range(len(levels)):
                own = CHILDREN[depth + level]
                assert levels[level, :, quantile] == pytest.approx(above * own[:, quantile])
                above *= own[0, quantile]


def test_no_more_levels_are_foreseen_than_the_horizon():
    below = Acceptance.uncalibrated(6).forecast(9).below
    assert [len(levels) for levels in below] == [min(HORIZON, 6 - depth) for depth in range(6)]
    assert HORIZON > 1
