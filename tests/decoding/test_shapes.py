"""Shapes: which is found on machines that keep their promises or do not, and what chains are planned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import Server, linear
from seeded_draft import SteadyDraft

from echo_trt.decoding.acceptance import Acceptance
from echo_trt.decoding.costs import Costs, Curve
from echo_trt.decoding.goodput import Goodput, Load
from echo_trt.decoding.policies import Policy
from echo_trt.decoding.shapes import LASTS, LONGEST, PLAIN, SEARCH, Shapes

POLICY = Policy("goodput", max_depth=5, beams=2, width=3, per_request=12)
CHILDREN = np.tile(np.array([[0.6], [0.1]]), (5, 1, 1))  # of any node: the best child is accepted with 0.6


def shapes_of(best: float = 0.6) -> Shapes:
    children = CHILDREN.copy()
    children[:, 0] = best
    return Shapes(Acceptance(Acceptance.uncalibrated(5).table, children))


def costs_of(target: Curve, draft: Curve) -> Costs:
    return Costs(Curve(target.sizes, target.seconds), Curve(draft.sizes, draft.seconds))


class Trials:
    """A machine on which each shape has its own rate: ``tokens`` and ``seconds`` [shapes, the search last]."""

    def __init__(self, shapes: Shapes, costs: Costs, requests: int, tokens: list[float], seconds: list[float]):
        self.shapes, self.costs, self.requests = shapes, costs, requests
        self.tokens, self.seconds = tokens, seconds
        self.rng = np.random.default_rng(0)

    @property
    def rates(self) -> np.ndarray:
        return np.array(self.tokens) / np.array(self.seconds)

    def run(self, iterations: int, noise: float = 0.1, longest: int = LONGEST) -> tuple[float, list[int]]:
        """Tokens a second, and the shapes that were in force."""
        tokens = seconds = 0.0
        chosen = []
        for _ in range(iterations):
            shape = self.shapes.choose(self.requests, 0, self.costs, 0.0, longest)
            took = self.seconds[shape] * np.exp(noise * self.rng.standard_normal())
            self.shapes.observe(self.requests, self.tokens[shape], took)
            chosen.append(shape)
            tokens, seconds = tokens + self.tokens[shape], seconds + took
        return tokens / seconds, chosen


def trials(*seconds: float, requests: int = 4) -> Trials:
    """Chains of 0 to 3 tokens and the search take so long; the tables promise 10, 12.2, 14.4, 16.6."""
    tokens = [requests * sum(0.6**d for d in range(depth + 1)) for depth in range(LONGEST + 1)]
    costs = costs_of(linear(10.0, 0.0), Curve([1, 99], [2.2, 2.2]))
    return Trials(shapes_of(), costs, requests, [*tokens, tokens[-1]], list(seconds))


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ((10, 14, 16, 15, 24), 3),
        ((10, 13, 20, 25, 26), 1),
        ((10, 14, 15, 19, 22), 2),
        ((10, 20, 25, 30, 30), PLAIN),
        ((10, 16, 20, 22, 11), SEARCH),
    ],
)
def test_the_best_shape_is_found_whatever_the_tables_promise(seconds, best):
    machine = trials(*seconds)
    machine.run(60 * LASTS)
    rate, chosen = machine.run(60 * LASTS)
    assert np.mean(np.array(chosen) == best) > 0.75
    assert rate > 0.95 * machine.rates.max()


def test_iterations_are_counted_by_shape():
    machine = trials(10, 14, 16, 15, 24)
    _, chosen = machine.run(40 * LASTS)
    names = {PLAIN: "plain", 1: "chain 1", 2: "chain 2", 3: "chain 3", SEARCH: "search"}
    assert machine.shapes.totals() == {name: chosen.count(shape) for shape, name in names.items()}


def test_where_much_is_promised_it_searches_always():
    machine = trials(10, 11, 12, 13, 30)
    machine.costs = costs_of(linear(10.0, 0.0), Curve([1, 99], [1.0, 1.0]))
    assert set(machine.run(20 * LASTS)[1]) == {SEARCH}


def test_a_shape_that_becomes_good_is_found_again():
    machine = trials(10, 11, 16, 22, 22)
    machine.run(40 * LASTS)
    machine.seconds[1], machine.seconds[2] = 15, 12
    machine.run(120 * LASTS)
    assert np.mean(np.array(machine.run(40 * LASTS)[1]) == 2) > 0.75


def test_a_disturbed_trial_does_not_condemn_a_shape():
    machine = trials(10, 14, 18, 11, 20)
    machine.run(20 * LASTS)
    machine.seconds[3] = 130
    machine.run(LASTS)
    machine.seconds[3] = 11
    machine.run(60 * LASTS)
    assert np.mean(np.array(machine.run(20 * LASTS)[1]) == 3) > 0.75


def test_a_shape_lasts_and_ends_where_the_load_is_another():
    shapes, costs = shapes_of(), costs_of(linear(10.0, 0.0), linear(1.0, 0.0))
    first = shapes.choose(4, 0, costs, 0.0, LONGEST)
    for requests in (4, 3, 5, 4) * 5:
        assert shapes.choose(requests, 0, costs, 0.0, LONGEST) == first
    steep = costs_of(linear(10.0, 10.0), linear(1.0, 0.0))
    assert shapes.choose(4, 0, steep, 0.0, LONGEST) == first
    assert shapes.choose(16, 0, steep, 0.0, LONGEST) in (PLAIN, SEARCH)


def test_a_load_that_is_new_begins_with_what_the_nearest_one_taught():
    machine = trials(10, 25, 25, 25, 10)  # chains take twice what the tables say
    machine.run(60 * LASTS)
    machine.requests, machine.tokens = 8, [2 * tokens for tokens in machine.tokens]
    _, chosen = machine.run(10 * LASTS)
    assert np.mean(np.array(chosen) > 0) < 0.25


@pytest.mark.parametrize("longest", range(LONGEST + 1))
def test_chains_are_no_longer_than_asked(longest):
    machine = trials(10, 14, 18, 12, 30)
    assert max(machine.run(40 * LASTS, longest=longest)[1]) == longest


@settings(max_examples=50, deadline=None)
@given(st.floats(0.3, 1.4))
def test_the_share_of_acceptance_is_learnt_from_drafts_and_hoped_for_without(share):
    shapes = shapes_of()
    for _ in range(600):
        shapes.drafted(0.6 * share)
        shapes.observe(4, 6.0, 1.0)
    assert shapes.share == pytest.approx(share, rel=0.02)
    for _ in range(300):
        shapes.observe(4, 4.0, 1.0)
    assert min(share, 1) - 1e-6 <= shapes.share <= max(share, 1)
    assert shapes.share > 0.4


def test_easy_and_hard_texts_leave_what_is_known_of_a_shape_as_it_is():
    shapes, costs = shapes_of(), costs_of(linear(10.0, 0.0), Curve([1, 99], [2.2, 2.2]))
    rng = np.random.default_rng(0)
    for _ in range(40):
        best = 0.6 * rng.uniform(0.5, 1.5)  # of a whole trial: one meets sums, another one open questions
        for _ in range(LASTS):
            shape = shapes.choose(4, 0, costs, 0.0, LONGEST)
            drafted = LONGEST if shape == SEARCH else shape
            if drafted:
                shapes.drafted(best)
            tokens = 4 * sum(best**d for d in range(drafted + 1))
            shapes.observe(4, tokens, 10.0 + 2.2 * drafted)
    mean = shapes._of(4)[0]
    assert abs(mean[1:-1]).max() < 0.03


def test_a_head_that_was_never_right_is_no_division_by_nothing():
    shapes = shapes_of(best=0.0)
    for _ in range(9):
        shapes.drafted(0.0)
        shapes.observe(4, 4.0, 1.0)
    assert shapes.choose(4, 0, costs_of(linear(0.01, 1e-3), linear(1e-3, 1e-5)), 0.0, LONGEST) in (PLAIN, SEARCH)
    assert np.isfinite(shapes.share)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 400), st.floats(1e-6, 10), st.floats(0, 1)), max_size=60))
def test_whatever_is_observed_a_shape_is_chosen(observed):
    shapes, costs = shapes_of(), costs_of(linear(0.01, 1e-3), linear(1e-3, 1e-5))
    for requests, tokens, seconds, best in observed:
        shapes.drafted(best)
        shapes.observe(requests, tokens, seconds)
        assert shapes.choose(max(requests, 1), 99, costs, 1e-4, 2) in (SEARCH, PLAIN, 1, 2)


# -- the chains --------------------------------------------------------------------------------------------------------


class Fixed(Shapes):
    """Always of one shape."""

    def choose(self, *_) -> int:
        return self.shape


def fixed(length: int) -> Goodput:
    acceptance = Acceptance.uncalibrated(5)
    shapes = Fixed(acceptance)
    shapes.shape = length
    return Goodput(costs_of(linear(0.01, 1e-3), linear(1e-3, 1e-5)), acceptance, 4, shapes)


@pytest.mark.parametrize("length", range(1, LONGEST + 1))
def test_each_request_gets_a_chain_of_its_best_tokens_as_far_as_it_has_room(length):
    room = np.array([9, 0, 1, 2])
    load = Load(np.arange(4), room, np.ones(4, np.int64), 0)
    draft = SteadyDraft([[0.6, 0.3], [0.9, 0.05], [0.2, 0.1], [0.5, 0.2]])
    plan = fixed(length).plan(np.array([7, 8, 9, 6]), draft, POLICY, load)
    assert (plan.tree.sizes == 1 + np.minimum(length, room)).all()
    assert plan.tree.token[plan.tree.depth == 0].tolist() == [7, 8, 9, 6]
    assert (plan.tree.token[plan.tree.depth > 0] == 0).all()  # the best of any children
    assert (np.diff(plan.tree.request) >= 0).all()
    below = np.flatnonzero(plan.tree.depth > 0)
    assert (plan.tree.parent[below] == below - 1).all()
    assert plan.probability[0] == 1
    assert plan.probability[1] == pytest.approx(0.6, rel=0.01)
    assert (np.diff(plan.probability)[plan.tree.depth[1:] > 0] < 0).all()


def test_a_chain_ends_where_the_draft_has_nothing():
    class Ended(SteadyDraft):
        def expand(self, tree, nodes):
            log_q, tokens = super().expand(tree, nodes)
            log_q[tree.request[nodes] == 1] = -np.inf
            return log_q, tokens

    load = Load(np.arange(2), np.full(2, 9), np.ones(2, np.int64), 0)
    plan = fixed(3).plan(np.zeros(2), Ended([[0.6, 0.1], [0.7, 0.1]]), POLICY, load)
    assert plan.tree.sizes.tolist() == [4, 2]


@pytest.mark.parametrize(("count", "right"), [(1, 0.7), (4, 0.7), (8, 0.5), (24, 0.7), (4, 0.05)])
def test_on_a_machine_with_a_knee_it_is_as_good_as_the_best_chain_and_as_plain_decoding(count, right):
    target, draft = Curve([1, 8, 16, 24, 64, 128], [10, 10, 11, 14, 40, 90]), linear(1, 0.02)
    acceptance = Acceptance.uncalibrated(POLICY.max_depth)
    planner = Goodput(costs_of(target, draft), acceptance, count, Shapes(acceptance))
    server = Server(planner, POLICY, target, draft, [right, 0.12, 0.05], count)
    server.run(1500)
    rates = [count / target(count)]
    for depth in range(1, LONGEST + 1):
        seconds = target(count * (1 + depth)) + depth * draft(count * 2)
        rates.append(count * sum(right**d for d in range(depth + 1)) / seconds)
    assert server.run(1500).rate > 0.95 * max(rates)
