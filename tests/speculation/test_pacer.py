"""Latency targets: who is late, what that is worth, who sits out, and how long prompts hold others up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import SHAPE, TUNING, linear, load_of, server_of
from seeded_draft import SteadyDraft

from echo_trt.speculation.goodput.ladder import Ladder
from echo_trt.speculation.goodput.model.costs import Curve
from echo_trt.speculation.goodput.model.iteration import prices
from echo_trt.speculation.pacer import (
    FIRST_CHUNK,
    HASTE,
    LEAST_CHUNK,
    LONGEST_GAP,
    PATIENCE,
    Latency,
    Pace,
    Pacer,
    Seats,
)
from echo_trt.speculation.shares import TenantShares

KNEE = Curve([1, 8, 16, 32, 64, 256], [10e-3, 10e-3, 12e-3, 20e-3, 38e-3, 150e-3])
DRAFT, CHILDREN = linear(1e-4, 1e-6), [0.7, 0.1, 0.05]
ALL = np.arange(3)


def pace_of(lag: list[float], wanted: list[float], waited: list[int] | None = None) -> Pace:
    return Pace(np.array(wanted, float), np.array(lag, float), np.array(waited or [0] * len(lag)))


def seats_of(pace: Pace, context: int = 0, waiting: int = 0, chunk: int = 256) -> Seats:
    """Return seats of requests in slots 0, 1, ..., the first of which has the ``context``."""
    slots, cached = np.arange(len(pace.wanted)), np.zeros(len(pace.wanted), np.int64)
    cached[0] = context
    return Seats(slots, cached, len(slots) + np.arange(waiting), chunk, False, pace)


def seated(planner, pace: Pace, context: int = 0) -> np.ndarray:
    """Return which requests are in the pass, bool [B]."""
    return np.isin(np.arange(len(pace.wanted)), planner.admit(seats_of(pace, context)).decoding)


@pytest.mark.parametrize(("target", "shared"), [(None, True), (0.5, False)])
def test_a_long_prompt_leaves_a_part_of_the_chunk_to_others_unless_its_target_hurries(target, shared):
    """Without a target it is due after PATIENCE, before all that come later, and takes many passes."""
    pacer, none = Pacer(2), np.zeros(0, np.int64)
    pacer.begin(0, Latency(target), 0.0)
    pacer.begin(1, Latency(0.3), 2 * PATIENCE)
    found = pacer.admit(Seats(none, none, np.array([1, 0]), 256), lambda seats: None, 2 * PATIENCE + 0.1)
    assert found.prompts.tolist() == [0, 1]
    assert found.shared == shared


def test_passes_are_shared_only_while_several_tenants_run(monkeypatch):
    """Where no keys are used, a pass costs nothing more."""
    pacer, slots, observed = Pacer(2), np.arange(2), []
    monkeypatch.setattr(TenantShares, "observe", lambda *noted: observed.append(noted))
    pacer.begin(0, Latency(), 0.0)
    for tenant, passes in ((b"", 0), (b"one", 1), (b"", 1), (b"two", 2)):
        pacer.begin(1, Latency(), 0.0, tenant=tenant)
        pacer.admit(Seats(slots, slots, slots[:0], 256), lambda seats: None, 0.0)
        pacer.ran(slots, slots, 0.1)
        pacer.end(1)
        assert len(observed) == passes


def test_a_request_is_behind_by_the_tokens_that_its_target_asks_for_since_the_first():
    pacer = Pacer(3)
    pacer.begin(0, Latency(tpot=0.1), arrived=0.0)
    pacer.begin(1, Latency(), arrived=0.0)
    pacer.begin(2, Latency(tpot=0.1), 0.0, started=1.0, tokens=7)  # it was preempted
    assert pacer.pace(np.array([1]), 5.0) is None
    pacer.emitted(np.array([0, 1]), np.array([1, 1]), 2.0)
    assert pacer.pace(ALL, 3.0).lag == pytest.approx([10, 0, 13])
    pacer.emitted(ALL, np.array([4, 9, 2]), 3.0)
    assert pacer.pace(ALL, 3.5).lag == pytest.approx([11, 0, 16])
    assert (pacer.end(0), pacer.end(2)) == (2.0, 1.0)


def test_prompts_come_by_when_they_are_due_and_a_late_one_hurries():
    pacer = Pacer(4)
    for slot, (ttft, arrived) in enumerate(((None, 0.0), (0.4, 1.0), (0.2, 1.1))):
        pacer.begin(slot, Latency(ttft), arrived)
    pacer.begin(3, Latency(tpot=0.01), 0.0)
    pacer.ran(np.array([3]), np.array([256]), LONGEST_GAP / 2, 256)

    def admitted(now: float, *prompts: int) -> Seats:
        seats = Seats(np.array([3]), np.array([9]), np.array(prompts), 256)
        return pacer.admit(seats, lambda seats: replace(seats, chunk=99), now)

    assert admitted(1.1, 0, 1, 2).prompts.tolist() == [2, 1, 0]
    assert admitted(1.1, 0, 1, 2).chunk == 99
    assert admitted(1.1 + HASTE * 0.2 + 0.01, 0, 1, 2).chunk == 256
    pacer.end(1), pacer.end(2), pacer.end(3)
    assert admitted(9.9, 2, 0, 1).prompts.tolist() == [2, 0, 1]  # where nobody has a target they stay as they are
    assert Latency().due(0.0) == PATIENCE
    assert Latency(ttft=9 * PATIENCE).due(1.0) == 1.0 + PATIENCE  # nobody waits for those who come later than that


@pytest.mark.parametrize(("pass_s", "token_s"), [(0.03, 4e-3), (0.02, 1e-4), (0.4, 0.1), (0.1, 2e-4)])
def test_a_chunk_holds_nobody_up_for_longer_than_the_gap_and_is_as_long_as_that_allows(pass_s, token_s):
    """A pass takes ``pass_s``, and ``token_s`` for a prompt token, one of which took ten times as long."""
    pacer, decoding, prompt, longest = Pacer(2), np.array([0]), np.array([1]), 0.0
    pacer.begin(0, Latency(), 0.0)

    def chunk_of(decoding: np.ndarray) -> int:
        return pacer.admit(Seats(decoding, 0 * decoding, prompt, 512), lambda seats: None, 0.0).chunk

    assert (chunk_of(decoding), chunk_of(decoding[:0])) == (FIRST_CHUNK, 512)
    for number in range(40):
        seconds = pass_s + token_s * (chunk := chunk_of(decoding))
        longest = max(longest, seconds) if number > 30 else 0.0
        pacer.ran(np.array([0, 1]), np.array([1, chunk]), seconds * (10 if number == 9 else 1), chunk)
        pacer.ran(np.array([0, 1]), np.array([1, 5]), pass_s + 5 * token_s, 5)  # a prompt's last tokens
    fits = int((LONGEST_GAP - pass_s) / token_s)
    assert longest <= max(LONGEST_GAP, pass_s + token_s * LEAST_CHUNK)
    assert min(max(fits - 2, LEAST_CHUNK), 512) <= chunk <= 512


@pytest.mark.parametrize("tpot", [1e-3, 1e-9, 1e-300, 5e-324])
def test_the_shortest_target_has_a_finite_price(tpot):
    pacer = Pacer(1)
    pacer.begin(0, Latency(tpot=tpot), 0.0)
    pacer.emitted(np.array([0]), np.array([1]), 0.0)
    pace = pacer.pace(np.array([0]), 1e6)
    found = prices(pace, TUNING, TUNING.max_price)
    assert np.isfinite([found.time, found.usual, *found.weights, *pace.lag]).all()
    server = server_of(KNEE, DRAFT, CHILDREN, 3)
    late = Pace(*(np.append(each, [0, 0]) for each in (pace.wanted, pace.lag, pace.waited)))
    assert plan_of(server, late).tree.sizes.min() >= 1
    assert seated(server.planner, late, 100)[0]
    assert 0 < server.planner.admit(seats_of(late, 100, 2)).chunk <= 256


def test_prices_rise_with_the_lag_up_to_a_bound_and_raise_the_price_of_time():
    found = prices(pace_of([-99, 0, 1, 999, 5], [10, 10, 20, 20, 0]), TUNING)
    price = TUNING.lag_price * (np.array([TUNING.lead, TUNING.lead + 1]))
    assert found.weights == pytest.approx([1, 1 + price[0], 1 + price[1], 1 + TUNING.max_price, 1])
    assert found.time == pytest.approx(10 * price[0] + 20 * price[1] + 20 * TUNING.max_price)
    assert prices(None, TUNING) is None


def plan_of(server, pace: Pace | None):
    count = len(server.slots)
    load = replace(load_of(count, max_draft_len=np.full(count, 99)), pace=pace, epoch=server.epoch)
    return server.planner.plan(np.zeros(count), SteadyDraft([CHILDREN] * count), load)


@pytest.mark.parametrize("count", [1, 4, 24])
def test_targets_that_are_kept_anyway_change_no_decision(count):
    plain, kept = (
        plan_of(server_of(KNEE, DRAFT, CHILDREN, count), pace) for pace in (None, pace_of([-99] * count, [50] * count))
    )
    assert plain.tree.parent.tolist() == kept.tree.parent.tolist()
    assert plain.probability.tolist() == kept.probability.tolist()


def test_a_late_request_gets_the_nodes():
    server = server_of(KNEE, DRAFT, CHILDREN, 16)
    before = plan_of(server, None).tree.sizes
    sizes = plan_of(server, pace_of([6] + [0] * 15, [60] + [0] * 15)).tree.sizes
    assert sizes[0] > before[0]
    assert sizes[0] > 2 * sizes[1:].mean()


class Fixed(Ladder):
    """Holds a size where tokens are priced, else none."""

    def __init__(self, held: int):
        super().__init__()
        self._held = held

    def size(self, requests, forecast, priced=False) -> int:
        return self._held * priced


def test_where_targets_weigh_tokens_the_size_is_a_priced_one():
    server, late = server_of(KNEE, DRAFT, CHILDREN, 8), pace_of([50] + [0] * 7, [60] + [0] * 7)
    planner = server.planner
    planner.ladder = Fixed(20)
    assert len(plan_of(server, late).tree) == 8  # nobody was late of late
    planner.learner.usual_price = TUNING.max_price
    assert plan_of(server, late).explanation.verification_size == 20
    assert len(plan_of(server, None).tree) == 8


def test_sizes_where_tokens_are_priced_begin_with_the_error_of_the_others_and_leave_them_alone():
    ladder, forecast = Ladder(TUNING), lambda: (np.array([16]), np.array([0.5]))
    for _ in range(TUNING.trial_iterations):
        ladder.size(8, forecast)
        ladder.observe(8.0, 0.01)
    plain = ladder._now
    plain._log_gains[1] += 0.25  # as comparisons would
    assert ladder.size(8, forecast, priced=True) == 16
    assert ladder._now is not plain
    assert ladder._now.prior_error == pytest.approx(plain.prior_error)
    iterations = plain._window.iterations
    ladder.observe(9.0, 0.01)
    assert plain._window.iterations == iterations
    ladder.size(8, forecast)
    assert ladder._now is plain
    assert plain._warm_up <= 0  # it is not interrupted


def test_a_late_request_is_drafted_for_at_once():
    server = server_of(KNEE, DRAFT, CHILDREN, 8)
    server.run(1)
    assert plan_of(server, pace_of([50] + [0] * 7, [60] + [0] * 7)).tree.sizes[0] > 1


@given(
    count=st.integers(2, 40),
    late=st.integers(1, 5),
    lag=st.floats(0, 100),
    context=st.integers(0, 10**6),
    seed=st.integers(0, 99),
)
def test_nobody_waits_longer_than_a_bound_and_who_has_a_target_never_does(count, late, lag, context, seed):
    rng, server = np.random.default_rng(seed), server_of(linear(1e-3, 1e-3), DRAFT, CHILDREN, count)
    server.planner.costs.target.per_context = 1e-7
    wanted, waited = np.where(np.arange(count) < late, 100.0, 0.0), np.zeros(count, np.int64)
    for _ in range(12):
        pace = Pace(wanted, np.where(wanted > 0, lag * rng.random(count), 0.0), waited)
        seats = seated(server.planner, pace, context)
        assert seats[:late].all()
        waited = np.where(seats, 0, waited + 1)
        assert waited.max() <= TUNING.max_sat_out


def test_others_sit_out_where_that_makes_passes_shorter_and_not_where_it_does_not():
    late = pace_of([9] * 2 + [0] * 30, [100] * 2 + [0] * 30)
    steep, flat = (server_of(curve, DRAFT, CHILDREN, 32).planner for curve in (linear(1e-3, 1e-3), linear(1e-2, 0)))
    assert seated(steep, late).sum() < 32
    steep.costs.change = 1.0  # seconds that a pass of another size takes longer
    assert seated(steep, late).all()
    steep.costs.change = 0.0
    assert seated(flat, late).all()
    assert seated(steep, pace_of([-99] * 2 + [0] * 30, [100] * 2 + [0] * 30)).all()


def test_chunks_shrink_beside_late_requests_and_are_whole_beside_others():
    planner = server_of(KNEE, DRAFT, CHILDREN, 8).planner
    late, early = (pace_of([lag] + [0] * 7, [100] + [0] * 7) for lag in (9, -99))
    one, many, unhurried = (
        planner.admit(seats_of(*each)).chunk for each in ((late, 0, 1), (late, 0, 40), (early, 0, 1))
    )
    assert one < many
    assert unhurried == 256
    assert SHAPE.tuning.max_sat_out < 10
