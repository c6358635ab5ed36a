"""The bill of saved time: what accepted tokens bring, what drafts take, and what plain decoding is known to take."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from speculation.machines import load_of

from echo_trt.speculation.bill import Bill, PlainClock
from echo_trt.speculation.drafts import Pass
from echo_trt.speculation.planner import PlainCost
from echo_trt.speculation.sources import DRAFT, LOOKUP, SOURCES
from echo_trt.speculation.super_tree import SuperTree

PLAIN = PlainCost(here=1.0, each=1.0, error=0.1)


def iteration(seconds: float, drafts: tuple[Pass, ...] = (), path: tuple[int, ...] = (0, 1, 2)):
    """Make one of a request, whose tree is a chain of two copied tokens below its root, and one of the draft's."""
    tree = SuperTree.from_roots(np.array([5]))
    for parent, token, source in ((0, 6, LOOKUP), (1, 7, LOOKUP), (0, 9, DRAFT)):
        tree.add(np.array([parent]), np.array([token]), np.zeros(1), source)
    plan = SimpleNamespace(tree=tree)
    return SimpleNamespace(plan=plan, load=load_of(1), path=np.array(path), drafts=drafts, seconds=seconds)


def test_accepted_tokens_bring_time_and_nodes_and_passes_take_it():
    bill = Bill()
    saved, error = bill.charge(iteration(1.9, (Pass(1, 1, 0.3),)), np.array([3]), PLAIN)
    assert saved == pytest.approx([1.1])
    assert error == pytest.approx([0.3])
    assert bill.saved[LOOKUP] == pytest.approx(2 - 0.4)
    assert bill.saved[DRAFT] == pytest.approx(-0.3 - 0.2)
    assert bill.saved.sum() == pytest.approx(1.1)
    assert bill.error == pytest.approx(0.3)


def test_tokens_behind_an_end_bring_nothing():
    bill = Bill()
    saved, _ = bill.charge(iteration(1.6), np.array([2]), PLAIN)
    assert saved == pytest.approx([0.4])
    assert bill.saved.sum() == pytest.approx(0.4)


def test_a_pass_without_drafts_saves_nothing_and_a_useless_draft_loses():
    bill, plain = Bill(), iteration(1.2, path=(0,))
    plain.plan.tree = SuperTree.from_roots(np.array([5]))
    assert not bill.charge(plain, np.array([1]), PLAIN)[0].any()
    assert not bill.saved.any()
    plain.drafts = (Pass(1, 1, 0.5),)
    assert bill.charge(plain, np.array([1]), PLAIN)[0] == pytest.approx([-0.2])
    assert bill.saved[DRAFT] == pytest.approx(-0.2)


def test_prompts_beside_a_draft_cost_plain_decoding_the_same():
    saved, _ = Bill().charge(iteration(5.3), np.array([3]), PlainCost(here=5.0, each=1.0, error=0.0))
    assert saved == pytest.approx([1.7])


def test_the_source_of_a_draft_is_reported_as_its_own():
    bill = Bill()
    bill.charge(iteration(1.9, (Pass(1, 1, 0.3),)), np.array([3]), PLAIN, proposer=LOOKUP)
    assert bill.saved[LOOKUP] == bill.saved.sum() == pytest.approx(1.1)
    assert len(bill.saved) == len(SOURCES)


def test_the_clock_learns_what_plain_passes_take_at_a_load_behind_a_warm_up():
    clock = PlainClock(0.1, 0.25, 0.97, 2, 10)
    for _ in range(20):
        for _ in range(2):
            clock.decoded(4, 9.0)
        clock.verified(4, 1.0)
    assert clock.factor(4) is None
    draw = np.random.default_rng(0)
    for number, ratio in enumerate(draw.normal(1.3, 0.05, 500)):
        clock.decoded(4, ratio)
        if number == 11:
            assert clock.factor(4) == pytest.approx((1.3, 0.1), abs=0.05)
    factor, error = clock.factor(4)
    assert factor == pytest.approx(1.3, abs=0.05)
    assert 0 < error < 0.02
    assert clock.factor(2) is None


@pytest.mark.parametrize("begins", ["verified", "decoded"])
def test_a_machine_that_becomes_slower_is_seen_by_its_verifications(begins):
    clock = PlainClock(0.1, 0.25, 0.97, 0, 10)
    for one, passes in ((begins, 20), ("verified", 200), ("decoded", 20)):
        for _ in range(passes):
            getattr(clock, one)(4, 1.2 if one == "verified" else 0.9)
    assert clock.factor(4)[0] == pytest.approx(0.9)
    for _ in range(200):
        clock.verified(4, 2 * 1.2)
    assert clock.factor(4)[0] == pytest.approx(2 * 0.9, rel=0.01)
