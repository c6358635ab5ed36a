"""Policies by name: which planner each one is, and with which numbers."""

import numpy as np
import pytest
from machines import load_of
from seeded_draft import NoDraft

from echo_trt.decoding.echo.planner import EchoPlanner
from echo_trt.decoding.planner import PlainPlanner
from echo_trt.decoding.policies import make_planner
from echo_trt.decoding.policy_names import GOODPUT, NAMES, PAPER, PLAIN
from echo_trt.errors import UserError

SETTINGS = {
    "budget": 2,
    "per_request": 9,
    "max_depth": 5,
    "beams": 2,
    "width": 3,
    "gates": {1: 0.3, 3: 0.2},
    "fixed_threshold": 0.4,
    "static": {"depth": 3, "top_k": 3, "tokens": 8},
}


def made(name: str):
    """A policy's planner; in a goodput planner's place, its name and settings."""
    return make_planner(name, SETTINGS, lambda *given: given)


def test_an_unknown_policy_is_named():
    with pytest.raises(UserError, match="policy is 'eco'; choose one of autoregressive, static"):
        made("eco")


def test_plain_decoding_and_the_papers_policies_have_a_planner_of_their_name():
    assert (PLAIN, *PAPER, *GOODPUT) == NAMES
    planners = {name: made(name) for name in (PLAIN, *PAPER)}
    assert {name: planner.name for name, planner in planners.items()} == {name: name for name in planners}
    plain = planners.pop(PLAIN)
    assert isinstance(plain, PlainPlanner)
    assert (plain.budget, plain.totals()) == (0, {})
    assert all(isinstance(planner, EchoPlanner) for planner in planners.values())
    assert {name: planner.budget for name, planner in planners.items()} == {
        "static": 0,
        "dense": 2,
        "fixed": 2,
        "echo": 2,
    }


@pytest.mark.parametrize("name", [PLAIN, "dense", "fixed", "echo"])
def test_where_nothing_beyond_the_roots_is_verified_no_draft_is_asked(name):
    plan = made(name).plan(np.array([5, 6]), NoDraft(), load_of(2))
    assert plan.tree.token.tolist() == plan.explanation.candidates.token.tolist() == [5, 6]
    assert plan.tree.parent.tolist() == [-1, -1]
    assert plan.probability.tolist() == [1, 1]
    assert plan.padded_to == 0


def test_the_goodput_policies_differ_in_their_candidates():
    given = {name: made(name) for name in GOODPUT}
    assert [name for name, _ in given.values()] == [name for name in NAMES if name.startswith("goodput")]
    usual, exact, head = (settings for _, settings in given.values())
    assert (usual.max_depth, usual.beams, usual.width, usual.per_request) == (5, 2, 3, 9)
    assert (usual.one_path, usual.free_candidates) == (False, True)
    assert (exact.beams, exact.width, exact.one_path, exact.free_candidates) == (1, 1, True, True)
    assert (head.beams, head.width, head.one_path, head.free_candidates) == (2, 3, False, False)
