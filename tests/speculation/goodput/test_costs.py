"""Cost curves: what they say between and beyond the measured sizes, and how they follow a machine that changes."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import TUNING

from echo_trt.speculation.drafts import Pass
from echo_trt.speculation.goodput.learner.costs import CostLearner, correct
from echo_trt.speculation.goodput.model.costs import Costs, Curve

SIZES = [1, 2, 4, 8, 16, 32, 64]
TABLE = [0.010, 0.011, 0.012, 0.020, 0.021, 0.050, 0.090]


def observe(curve: Curve, tokens: int, context: int, seconds: float) -> None:
    correct(curve, Pass(tokens, context, seconds), TUNING)


@st.composite
def tables(draw) -> tuple[list[int], list[float]]:
    """Ascending sizes from 1 and jagged monotone seconds."""
    more = draw(st.lists(st.integers(2, 100), min_size=1, max_size=8, unique=True))
    sizes = [1, *sorted(more)]
    steps = draw(st.lists(st.sampled_from([0.0, 1e-4, 3e-3, 0.1]), min_size=len(sizes), max_size=len(sizes)))
    return sizes, (1e-3 + np.cumsum(steps)).tolist()


def straight(sizes: list[int], seconds: list[float], tokens: int) -> float:
    """On the line between the measured sizes around ``tokens``; beyond the last, as steep as from a quarter on."""
    if tokens == 0:
        return 0.0
    if tokens > sizes[-1]:
        bend = next(i for i in reversed(range(len(sizes) - 1)) if i == 0 or 4 * sizes[i] <= sizes[-1])
        slope = (seconds[-1] - seconds[bend]) / (sizes[-1] - sizes[bend])
        return seconds[-1] + slope * (tokens - sizes[-1])
    for (low, before), (high, after) in zip(
        zip(sizes, seconds, strict=True), zip(sizes[1:], seconds[1:], strict=True), strict=False
    ):
        if low <= tokens <= high:
            return before + (after - before) * (tokens - low) / (high - low)
    raise AssertionError("sizes begin at 1")


@given(tables(), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_a_curve_is_straight_between_sizes_and_goes_on_as_steep_as_its_last_three_quarters(table, requested):
    curve = Curve(*table)
    for tokens in requested:  # in any order: a far one makes it look further, and must not change the near ones
        assert curve(tokens) == pytest.approx(straight(*table, tokens))
        assert curve.base(tokens)[tokens] == curve(tokens)
        assert len(curve.base(tokens)) > tokens
    assert (np.diff(curve.base(500)) >= 0).all()


@given(
    tables(),
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 500), st.floats(0, 10)), max_size=40),
)
def test_whatever_is_observed_a_curve_stays_monotone_and_finite(table, observed):
    curve = Curve(*table, per_context=1e-5)
    for tokens, context, seconds in observed:
        observe(curve, tokens, context, seconds)
    dense = curve.base(300)
    assert np.isfinite(dense).all()
    assert dense[0] == 0
    assert dense[1] > 0
    assert (np.diff(dense) >= 0).all()
    assert (np.diff(curve.seconds) >= 0).all()


KNEE = Curve(SIZES, [0.01, 0.01, 0.01, 0.01, 0.01, 0.02, 0.04])


@pytest.mark.parametrize("factor", [0.6, 1.8])
def test_a_pass_corrects_sizes_near_its_own_and_by_a_share_all_others(factor):
    """Were the others believed as fast as ever, they would look cheap on a machine that has become slower."""
    curve = copy.deepcopy(KNEE)
    for _ in range(200):
        observe(curve, 8, 0, factor * 0.01)
    assert curve(8) == pytest.approx(factor * 0.01, rel=0.02)
    # Of passes that take as long as this one, smaller ones take no longer than it, and else follow by a share.
    assert curve(1) == pytest.approx((factor if factor < 1 else factor**TUNING.shared_cost) * 0.01, rel=0.05)
    assert curve(64) == pytest.approx((factor if factor < 1 else factor**TUNING.shared_cost) * 0.04, rel=0.05)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_curve_finds_another_machine_and_what_context_costs_is_taken_off(factor):
    curve = Curve(SIZES, TABLE, per_context=1e-6)
    rng = np.random.default_rng(0)
    for tokens in rng.choice(np.arange(1, 65), 3000):
        truth = factor * straight(SIZES, TABLE, tokens)
        observe(curve, int(tokens), 5000, truth * np.exp(rng.normal(0, 0.05)) + 1e-6 * 5000)
    for tokens in (1, 3, 8, 16, 20, 40, 64):
        assert curve(tokens) == pytest.approx(factor * straight(SIZES, TABLE, tokens), rel=0.12)
        assert curve(tokens, 5000) - curve(tokens) == pytest.approx(5e-3)


def test_a_pass_that_was_disturbed_says_little():
    curve, calm = Curve(SIZES, TABLE), Curve(SIZES, TABLE)
    for seconds, maximum in ((100.0, 0.03), (1e-9, 0.1)):
        for _ in range(100):
            observe(curve, 8, 0, TABLE[3])
        observe(curve, 8, 0, seconds)
        assert 0.99 * maximum <= abs(np.log(curve.seconds[3] / TABLE[3])) < 1.3 * maximum
    for i in range(300):
        observe(curve, 8, 0, 1.0 if i % 20 == 0 else TABLE[3])
        observe(calm, 8, 0, TABLE[3])
    assert curve(8) == pytest.approx(calm(8), rel=0.04)


def test_a_verification_costs_what_the_next_size_does():
    costs = Costs(Curve([1, 8, 16, 24], [1.0, 2.0, 3.0, 4.0]), Curve([1], [0.1]), sizes=(8, 16, 24))
    got = costs.verifications(9, np.arange(19))
    assert got[0] == costs.target(9) == costs.plain(9, 0)  # plain decoding is not padded
    assert (got[1:8] == 3.0).all()  # 10 to 16 tokens
    assert (got[8:16] == 4.0).all()  # 17 to 24
    assert got[18] == costs.target(27)  # beyond the last one as it comes
    assert costs.plain(3, 0) == costs.verifications(3, np.zeros(1, int))[0] == 2.0  # any pass has the first size


@pytest.mark.parametrize("sizes", [(), (4, 6, 8, 10, 12, 14, 16), (1, 2, 4, 8, 16, 32)])
@pytest.mark.parametrize("requests", [1, 40])
def test_rungs_are_sizes_above_the_requests_a_quarter_apart(sizes, requests):
    costs = Costs(KNEE, Curve([1], [0.1]), sizes=sizes)
    verification_sizes = costs.verification_sizes(requests, 8 * requests, 1.25)
    assert (verification_sizes == [costs.padded(size) for size in verification_sizes.tolist()]).all()
    assert requests < verification_sizes[0] <= costs.padded(int(1.25 * requests) + 1)
    assert (verification_sizes[1:] >= 1.25 * verification_sizes[:-1]).all()
    assert verification_sizes[-2] < 8 * requests <= verification_sizes[-1]


@pytest.mark.parametrize(("change", "padded"), [(0.3, 6), (0.2, 0)])
def test_a_pass_is_padded_to_the_usual_size_where_a_change_is_dearer(change, padded):
    costs = Costs(Curve([1, 4, 16], [1.0, 2.0, 5.0]), Curve([1], [0.1]), change=change, sizes=(4, 6, 8))
    assert costs.padding_target(2, 6) == costs.padding_target(4, 6) == padded  # half a second more, for two changes
    assert costs.padding_target(5, 6) == costs.padding_target(6, 6) == 6
    assert costs.padding_target(7, 6) == 0


def test_a_pass_that_changed_its_size_says_nothing_of_others():
    costs = Costs(Curve([1, 8, 16], [1.0, 2.0, 3.0]), Curve([1], [0.1]), change=0.1, sizes=(8, 16))
    learner = CostLearner(costs, TUNING)
    for _ in range(50):
        learner.observe_target(Pass(8, 0, 4.0, 1), 0)
        learner.observe_target(Pass(16, 0, 6.0, 1), 0)
        learner.observe_target(Pass(100, 0, 90.0, 0), prompts=92)
    assert costs.target.seconds == pytest.approx([1.0, 2.0, 3.0])
    learner.observe_target(Pass(16, 0, 6.0, 1), 0)
    learner.observe_target(Pass(16, 0, 6.0, 1), 0)
    assert costs.target(16) > 3.0


@pytest.mark.parametrize("times", [1.0, 1.2])
def test_passes_that_were_timed_together_share_their_time_as_the_curve_says(times):
    """A catch-up of many tokens and levels of few, in one launch: a slower machine makes both slower alike."""
    costs = Costs(Curve([1], [1.0]), Curve([8, 640], [0.1, 0.9]))
    learner, seconds = CostLearner(costs, TUNING), times * (0.9 + 3 * 0.1)
    for _ in range(100):
        learner.observe_drafts([Pass(tokens, 0, seconds / 4, together=4) for tokens in (640, 8, 8, 8)])
    assert costs.draft.seconds == pytest.approx(times * np.array([0.1, 0.9]), rel=0.05)
