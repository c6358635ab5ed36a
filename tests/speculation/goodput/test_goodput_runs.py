"""Goodput over hundreds of iterations on a machine that keeps time: as good as the best that is fixed, and true again
after what it has learnt has changed."""

import numpy as np
import pytest
from machines import SHAPE, linear, server_of

from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Curve
from echo_trt.speculation.sources import DRAFT


@pytest.mark.parametrize(("count", "each"), [(1, 1e-5), (8, 2e-4)])
def test_where_drafting_never_pays_it_is_probed_at_about_a_hundredth_of_the_time(count, each):
    """A request that was left alone is far behind, and its draft must catch up: that is paid as well."""
    server = server_of(linear(0.01, 0.012), linear(1e-3, each), [0.1, 0.05, 0.02], count).run(1500)
    assert server.drafts >= 5
    assert server.drafting <= 0.01 * server.seconds
    assert server.rate >= 0.99 * count / server.target(count)


@pytest.mark.parametrize(("count", "change"), [(4, 0.0), (8, 3e-3)])
def test_a_draft_that_becomes_good_is_found_again(count, change):
    """``change``: seconds that another size costs, by which the ladder and not the search decides."""
    server = server_of(linear(0.01, 1e-4), linear(4e-3, 1e-6), [0.05, 0.02, 0.01], count, change)
    server.run(500)
    server.q = server.right = [0.9, 0.05, 0.01]
    server.run(4000)
    assert server.run(200).rate > 1.3 * count / server.target(count)


def test_a_draft_that_becomes_cheap_is_found_again():
    server = server_of(linear(0.01, 1e-4), linear(0.0105, 1e-6), [0.8, 0.1, 0.05], 4)
    assert server.run(500).drafting < 0.012 * server.seconds
    server.draft = linear(1e-3, 1e-6)
    server.run(4000)
    assert server.run(200).rate > 1.5 * 4 / server.target(4)


def test_a_draft_that_becomes_dear_is_left():
    server = server_of(linear(0.01, 1e-4), linear(1e-3, 1e-6), [0.8, 0.1, 0.05], 4)
    assert server.run(200).rate > 1.5 * 4 / server.target(4)
    server.draft = linear(0.015, 1e-6)
    server.run(300)
    server.run(1500)
    assert server.run(400).rate > 0.97 * 4 / server.target(4)


@pytest.mark.parametrize("count", [1])
def test_what_a_draft_must_catch_up_with_is_paid_once_for_many_iterations(count):
    """After a prompt of 200 tokens the first draft costs twice per iteration, and every other one a tenth."""
    server = server_of(linear(0.01, 1e-4), linear(1e-3, 1e-4), [0.8, 0.1, 0.05], count)
    server.draft_lag[:] = 200
    assert server.run(100).rate > 1.4 * count / server.target(count)


@pytest.mark.parametrize("count", [1, 4, 24])
def test_it_is_as_good_as_the_better_of_plain_decoding_and_any_fixed_tree(count):
    """On a machine with a knee: chains of each length for all, verified whatever they cost."""
    target, draft = Curve([1, 8, 16, 24, 64, 128], [10, 10, 11, 14, 40, 90]), linear(1, 0.02)
    q = [0.7, 0.12, 0.05]
    server = server_of(target, draft, q, count)
    server.run(200)
    rates = [count / target(count)]
    for depth in range(1, SHAPE.max_depth + 1):
        tokens = sum(0.7**d for d in range(depth + 1))
        seconds = target(count * (1 + depth)) + sum(draft(count * d) for d in (3, *range(1, depth)))
        rates.append(count * tokens / seconds)
    assert server.run(300).rate > 0.96 * max(rates)


def test_a_boastful_draft_is_seen_through():
    """It says 0.9 where 0.5 are right: the fit must come to believe the half."""
    server = server_of(linear(0.01, 5e-4), linear(5e-4, 1e-5), [0.9, 0.05, 0.02], 4)
    server.right = [0.5, 0.05, 0.02]
    server.run(700)
    model = server.planner.acceptance
    first = model.probability(np.array([DRAFT]), np.array([1]), np.log([0.9]))[0]
    assert first == pytest.approx(0.5, abs=0.1)
    assert (model.bias[1:] == Acceptance.uncalibrated(SHAPE.max_depth).bias[1:]).all()
    assert server.run(200).rate >= 0.98 * 4 / server.target(4)
