"""N-grams: what continues the leaves of a tree, against a plain walk, and what the policy makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from forests import path_to, super_trees
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import SHAPE, TUNING, Recorded, linear, load_of
from ngram_tables import Known, table
from seeded_draft import NoDraft, SteadyDraft

from echo_trt.engine.sources.ngrams import NGramSource
from echo_trt.speculation.goodput.learner.sources import SourceLearner
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED_START, Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.policies import goodput_settings
from echo_trt.speculation.sources import NGRAM
from echo_trt.speculation.super_tree import SuperTree

LONGEST, FLOOR = 3, TUNING.min_continuation
TOKENS = st.integers(0, 4)  # few, so that contexts meet


@st.composite
def cases(draw) -> tuple[SuperTree, np.ndarray, Known, np.ndarray, np.ndarray, float]:
    tree = draw(super_trees(max_requests=3, max_nodes=10))
    contexts = st.lists(TOKENS, min_size=1, max_size=LONGEST).map(tuple)
    known = draw(st.dictionaries(contexts, st.tuples(TOKENS, st.sampled_from([0.2, 0.7, 0.99])), max_size=40))
    recent = np.array([draw(st.lists(st.integers(-1, 4), min_size=3, max_size=3)) for _ in range(tree.num_requests)])
    recent[np.maximum.accumulate(recent[:, ::-1] < 0, axis=1)[:, ::-1]] = -1  # a text has no holes
    deepest = np.array([draw(st.integers(0, 5)) for _ in range(tree.num_requests)])
    probability = np.exp(tree.score.astype(np.float64))
    return tree, probability, known, recent, deepest, draw(st.sampled_from([-1.0, 0.0, 0.5]))


def walked(
    tree: SuperTree, probability: np.ndarray, known: Known, recent: np.ndarray, deepest: np.ndarray, shift: float
) -> dict[tuple[int, ...], float]:
    """Every continuation as (leaf, tokens below it ...) -> P(accept)."""
    found = {}
    for leaf in sorted(set(range(len(tree))) - set(tree.parent.tolist())):
        own, p, below = int(tree.request[leaf]), float(probability[leaf]), []
        text = [int(t) for t in recent[own] if t >= 0] + [int(tree.token[node]) for node in path_to(tree, leaf)]
        while p >= FLOOR and tree.depth[leaf] + len(below) < deepest[own]:
            ends = [tuple(text[-size:]) for size in range(min(LONGEST, len(text)), 0, -1)]
            context = next((end for end in ends if end in known), None)
            if context is None:
                break
            token, chance = known[context]
            odds = chance / (1 - chance) * np.exp(shift)
            p *= odds / (1 + odds)
            if p >= FLOOR:
                text.append(token)
                below.append(token)
                found[leaf, *below] = p
    return found


@settings(max_examples=3 * settings().max_examples)  # ties are rare
@given(cases())
def test_leaves_go_on_with_what_the_longest_known_context_says(case):
    tree, probability, known, recent, deepest, shift = case
    if not known:
        return
    chains = table(known, LONGEST).chains(tree, probability, recent, deepest, shift, FLOOR)
    got = {}
    for leaf, tokens, log_p in zip(chains.above.tolist(), chains.tokens.tolist(), chains.log_p.cumsum(1), strict=True):
        for index in range(tokens.index(-1) if -1 in tokens else len(tokens)):
            got[leaf, *tokens[: index + 1]] = probability[leaf] * np.exp(log_p[index])
    assert got == pytest.approx(walked(*case))


@pytest.mark.parametrize("policy", ["goodput", "goodput-exact"])
def test_the_policy_verifies_what_costs_little(policy):
    costs = Costs(linear(1.0, 0.01), linear(9.0, 0.0))  # a draft would cost more than it can bring
    ngrams = table({(5,): (6, 0.9), (5, 6): (7, 0.8), (4,): (9, 0.002)}, LONGEST)
    settings = goodput_settings(policy, {"per_request": 9, "max_depth": 4, "beams": 2, "width": 2})
    acceptance = Acceptance.uncalibrated(SHAPE.max_depth)
    planner = GoodputPlanner(policy, settings, costs, acceptance, 2, [NGramSource(ngrams, settings, acceptance)])
    plan = planner.plan(np.array([5, 4]), NoDraft(), load_of(2))
    drafted = np.flatnonzero(plan.tree.parent >= 0)
    got = zip(plan.tree.request[drafted], plan.tree.token[drafted], plan.probability[drafted], strict=True)
    assert [(r, t, pytest.approx(p)) for r, t, p in got] == [(0, 6, 0.9), (0, 7, 0.72)]
    assert (plan.tree.source[drafted] == NGRAM).all()


def test_candidates_keep_what_they_are_worth():
    tree = SuperTree.from_roots(np.array([5]))
    ngrams = table({(5, 1): (8, 0.5), (2,): (9, 0.5)}, LONGEST)
    acceptance, deepest, recent = Acceptance.uncalibrated(4, CALIBRATED_START), np.array([4]), np.full((1, LONGEST), -1)
    continued = lambda tree, p: [ngrams.chains(tree, p, recent, deepest, 0.0, FLOOR)]  # noqa: E731
    candidates = Candidates(tree, acceptance, np.ones(1), np.array([9]), continue_leaves=continued)
    candidates.add(np.zeros(1, np.int64), np.log([[0.6, 0.3]]), np.array([[1, 2]]), 2)
    candidates.append_continuations()
    assert tree.parent.tolist() == [-1, 0, 0, 1, 2]
    assert candidates.probability[3:] == pytest.approx(candidates.probability[1:3] * 0.5)
    assert tree.source.tolist()[3:] == [NGRAM, NGRAM]
    assert len(candidates.frontier(2, 4)) == 0  # a head has no state to draft from there


def test_a_shift_follows_what_is_accepted():
    """They claim a half, and a quarter is right."""
    model = Acceptance.uncalibrated(4)
    learner = SourceLearner(model, TUNING)
    start = model.bias[:NGRAM].copy()
    for _ in range(100):
        p = 1 / (1 + np.exp(-model.bias[NGRAM, 0]))
        depth, score = np.array([1, 2, 1, 2]), np.full(4, np.log(p))
        learner.observe(np.full(4, NGRAM), depth, score, np.full(4, p), np.array([1.0, 0, 0, 0]))
    assert 1 / (1 + np.exp(-model.bias[NGRAM, 0])) == pytest.approx(0.25, abs=0.02)
    assert (model.bias[:NGRAM] == start).all()
    assert learner.totals()["accepted"]["ngram"] == 100


def chain_planner(max_depth: int, costs: Costs, acceptance: Acceptance, ngrams: NGrams) -> GoodputPlanner:
    settings = GoodputSettings(max_depth=max_depth, beams=1, width=1, per_request=9)
    return GoodputPlanner("goodput", settings, costs, acceptance, 1, [NGramSource(ngrams, settings, acceptance)])


@pytest.mark.parametrize(("chance", "levels"), [(0.01, 2), (0.97, 0)])
def test_no_level_is_drafted_for_what_ngrams_bring_anyway(chance, levels):
    """The draft is right nine times of ten at each level, and costs a tenth of a pass; three tokens are verified."""
    costs = Costs(Curve([1, 3, 4], [1.0, 1.0, 9.0]), linear(0.1, 0.0))
    ngrams = table({(5,): (6, chance), (6,): (5, chance)}, LONGEST)
    acceptance = Acceptance(Acceptance.uncalibrated(4).table, np.tile([[[0.9]]], (4, 1, 1)))
    draft, load = Recorded(SteadyDraft([[0.9]])), load_of(1)
    plan = chain_planner(2, costs, acceptance, ngrams).plan(np.array([5]), draft, load)
    assert draft.passes == levels
    assert len(plan.tree) > 1


@pytest.mark.parametrize(("right", "levels"), [(0.95, 1), (0.1, 0)])
def test_a_level_that_is_seldom_right_takes_from_ngrams_what_they_would_bring(right, levels):
    """Three tokens that n-grams name cost nothing to verify, and hang under the level's own where that is drafted."""
    costs = Costs(Curve([1, 9, 10], [1.0, 1.0, 9.0]), linear(0.02, 0.0))
    ngrams = table({(5,): (6, 0.6), (6,): (7, 0.95), (7,): (8, 0.95)}, LONGEST)
    acceptance = Acceptance(Acceptance.uncalibrated(4).table, np.tile([[[right]]], (4, 1, 1)))
    draft, load = Recorded(SteadyDraft([[right]])), load_of(1)
    plan = chain_planner(1, costs, acceptance, ngrams).plan(np.array([5]), draft, load)
    assert draft.passes == levels
    assert len(plan.tree) > 1
