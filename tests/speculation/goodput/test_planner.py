"""Goodput: the chosen nodes against every other choice, and when drafting pays."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from forests import super_trees
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from machines import SHAPE, SIZES, TUNING, Copied, Recorded, copied_chains, linear, load_of, random_acceptance
from seeded_draft import NoDraft, SeededDraft, SteadyDraft, drafted

from echo_trt.speculation.chains import Chains
from echo_trt.speculation.drafts import Pass
from echo_trt.speculation.goodput.ladder import ForecastGains, Ladder
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.goodput.optimiser.levels import BINS, LevelSearch
from echo_trt.speculation.goodput.optimiser.nodes import paying_nodes, select
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import Explanation, Iteration, Plan, StepContext
from echo_trt.speculation.policies import goodput_settings
from echo_trt.speculation.sources import DRAFT, LOOKUP
from echo_trt.speculation.super_tree import SuperTree

FREE = Curve([1], [0.0])


def flat(seconds: float) -> Curve:
    return linear(seconds, 0.0)


def planner_of(
    target: Curve,
    draft: Curve,
    count: int = 4,
    acceptance: Acceptance | None = None,
    settings: GoodputSettings = SHAPE,
    copied: Chains | None = None,
    head: bool = True,
) -> GoodputPlanner:
    acceptance = acceptance or Acceptance.uncalibrated(settings.max_depth)
    sources = [Copied(copied)] if copied else []
    planner = GoodputPlanner("goodput", settings, Costs(target, draft), acceptance, count, sources, head=head)
    planner.ladder = Highest()
    return planner


class Highest(Ladder):
    """Leaves it to the search whether anything is drafted."""

    def size(self, requests: int, forecast: ForecastGains, priced: bool = False) -> int:
        return int(forecast()[0][-1])


def price_of(planner: GoodputPlanner, load: StepContext) -> float:
    return planner.learner.model(load, planner.settings).time_price


def steady(count: int, *q: float) -> Recorded:
    return Recorded(SteadyDraft([q] * count))


# -- what is verified ------------------------------------------------------------------------------------------------


@st.composite
def choices(draw) -> tuple[SuperTree, np.ndarray, int, np.ndarray, float]:
    """Return a small tree, its nodes' values, a limit per request, jagged seconds, of which one may be spared, and a
    price.
    """
    tree = draw(super_trees(max_requests=3, max_nodes=8))
    weights = np.array(draw(st.lists(st.floats(0.8, 1.25), min_size=3, max_size=3)))
    value = np.exp(tree.score.astype(np.float64)) * weights[tree.request]
    steps = draw(st.lists(st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0]), min_size=9, max_size=9))
    change = draw(st.sampled_from([0.0, 1.5])) * (np.arange(9) != draw(st.integers(0, 8)))
    time_price = draw(st.sampled_from([0.0, 0.1, 0.5, 2.0]))
    return tree, value, draw(st.integers(1, 5)), 1.0 + np.cumsum(steps) + change, time_price


@settings(max_examples=3 * settings().max_examples)  # ties are rare
@given(choices())
def test_no_other_choice_is_worth_more(case):
    tree, value, per_request, seconds, time_price = case
    roots = set(range(tree.num_requests))
    others = [node for node in range(len(tree)) if node not in roots]

    def worth(nodes: set[int]) -> float:
        return sum(value[node] for node in nodes - roots) - time_price * seconds[len(nodes - roots)]

    def allowed(nodes: set[int]) -> bool:
        closed = all(int(tree.parent[node]) in nodes | {-1} for node in nodes)
        return closed and max(np.bincount(tree.request[list(nodes)])) <= per_request

    chosen = select(value, tree, per_request, seconds, time_price).tolist()
    assert chosen == sorted(set(chosen))
    assert roots <= set(chosen)
    assert allowed(set(chosen))
    every = (roots | set(more) for size in range(len(others) + 1) for more in combinations(others, size))
    assert worth(set(chosen)) == pytest.approx(max(worth(nodes) for nodes in every if allowed(nodes)), abs=1e-9)


# -- whether to draft ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_draft_that_costs_more_than_it_can_bring_is_not_asked(count, levels):
    """Verifying costs nothing here, so what a level brings is what its children are worth."""
    # Either only the first level brings something, or the second brings as much.
    children = np.array([[[0.3, 0.5]], *[[[0.0, 0.0] if levels == 1 else [1.0, 1.0]]] * 2])
    acceptance = Acceptance(random_acceptance(0).table, children)
    # Tokens of a request, level by level
    added = acceptance.forecast(9, TUNING.horizon).child_shares[0].mean(axis=2).sum(axis=1)
    worth = count * max(added.cumsum() / np.arange(1, len(added) + 1))  # a pass, of as many levels as are best
    for dear, requested in ((1.01, False), (0.99, True)):
        planner = planner_of(flat(0.01), FREE, count, acceptance)
        planner.learner.costs.draft = flat(dear * worth / price_of(planner, load_of(count)))
        draft = steady(count, 0.5, 0.1, 0.1)
        plan = planner.plan(np.zeros(count), draft if requested else NoDraft(), load_of(count))
        assert draft.roots == (list(range(count)) if requested else [])
        assert requested or len(plan.tree) == count


@pytest.mark.parametrize(("prompt_tokens", "drafts"), [(0, True), (10, True), (200, False)])
def test_beside_a_long_chunk_no_network_is_asked_nor_the_ladder(prompt_tokens, drafts):
    """What is free joins the pass where it pays; a chunk of ten tokens is none."""
    copied = copied_chains(np.full((4, 2), 7), np.log(np.full(4, 0.9)))
    for copies in (None, copied):
        planner, sizes = planner_of(Curve([1, 8, 256], [0.01, 0.01, 0.15]), flat(1e-4), 4, copied=copies), []
        planner.ladder.size = lambda requests, *_, sizes=sizes: sizes.append(requests) or 36
        draft = steady(4, 0.9, 0.05, 0.02)
        plan = planner.plan(np.zeros(4), draft, replace(load_of(4), prompt_tokens=prompt_tokens))
        assert draft.roots == (list(range(4)) if drafts else [])
        assert sizes == ([4] if drafts else [])
        assert (len(plan.tree) > 4) == (drafts or copies is not None)


def test_where_a_further_token_costs_more_than_it_brings_only_roots_are_verified():
    """Neither a free draft nor copied text is worth verifying then."""
    for count in (1, 3):
        copied = copied_chains(np.full((count, 2), 7), np.log(np.full(count, 0.9)))
        for each, verified in ((1.01, False), (0.3, True)):
            target = Curve(range(1, 40), [0.01 * (1 + each * max(n - count, 0) / count) for n in range(1, 40)])
            draft = steady(count, 0.95, 0.01, 0.01) if verified else NoDraft()
            plan = planner_of(target, flat(1e-9), copied=copied).plan(np.zeros(count), draft, load_of(count))
            assert (len(plan.tree) > count) == verified
            planner = planner_of(target, flat(1e-9), copied=copied, head=False)
            plan = planner.plan(np.zeros(count), NoDraft(), load_of(count))
            assert (plan.tree.source[plan.tree.parent >= 0] == LOOKUP).all()
            assert len(plan.tree) == count * (3 if verified else 1)


def test_one_that_is_far_behind_is_left_where_others_are_not():
    planner = planner_of(flat(0.01), FREE)
    planner.learner.costs.draft = Curve([1, 400], np.array([1, 400]) * 0.3 * 0.59 / price_of(planner, load_of(4)))
    draft = steady(4, 0.5, 0.1, 0.1)
    planner.plan(np.zeros(4), draft, load_of(4, draft_lag=np.array([1, 1, 1, 300])))
    assert draft.roots == [0, 1]  # tried are 1, 2 and all


@pytest.mark.parametrize(("max_draft_len", "drafts"), [(250, True), (50, False)])
def test_a_prompt_is_caught_up_with_where_enough_is_left_to_serve(max_draft_len, drafts):
    """It takes six passes of plain decoding: over 31 iterations that draft of 250 tokens, or over six of 50."""
    planner = planner_of(flat(0.02), linear(0.0, 3e-4), 1)
    draft = steady(1, 0.5, 0.1, 0.1)
    planner.plan(np.zeros(1), draft, load_of(1, max_draft_len=np.array([max_draft_len]), draft_lag=np.array([400])))
    assert (draft.roots == [0]) == drafts


def test_prompts_in_the_same_call_make_a_token_cost_what_it_costs_there():
    knee = Curve([1, 2, 16, 17, 128], [0.01, 0.01, 0.01, 0.02, 2.0])
    copied = copied_chains(np.full((2, 3), 7), np.log(np.full(2, 0.9)))
    planner = planner_of(knee, FREE, 2, copied=copied, head=False)
    for prompt_tokens, verified in ((0, 8), (12, 4), (14, 2)):
        plan = planner.plan(np.zeros(2), NoDraft(), load_of(2, prompt_tokens=prompt_tokens))
        assert len(plan.tree) == verified


def test_a_second_is_worth_what_plain_decoding_makes_of_it_times_what_was_gained():
    planner, load = planner_of(Curve([1, 4, 8], [0.01, 0.02, 0.03], per_context=1e-5), FREE, head=False), load_of(4)
    assert price_of(planner, load_of(4, context=500)) == pytest.approx(4 / 0.025)
    plan = planner.plan(np.zeros(4), NoDraft(), load)
    for _ in range(400):
        planner.observe(Iteration(plan, load, np.arange(4), Pass(4, 0, 0.02), (), 0, 0.0, seconds=0.01, host=0.005))
    # 4 tokens in 0.01 s, where a plain iteration takes 0.02 s and 0.005 s of the host
    assert price_of(planner, load_of(4)) == pytest.approx(4 / 0.01, rel=0.01)


def test_what_nodes_attend_again_is_not_taken_for_a_slow_machine():
    """Behind a long context a verification takes longer than a plain pass, and the bill knows why."""
    target = Curve([1, 4, 8], [0.01, 0.02, 0.03], per_context=1e-5, per_node=1e-5)
    planner, load = planner_of(target, FREE, head=False), load_of(4, context=4000)
    tree = SuperTree.from_roots(np.zeros(4, np.int64))
    tree.add(np.array([3]), np.array([7]), np.zeros(1), LOOKUP)
    seconds = 0.0225 + 4000e-5 + 1000e-5  # its node attends 1,000 tokens
    plan = Plan(tree, np.ones(5), Explanation(tree, np.ones(5), np.arange(5)))
    verified = Iteration(plan, load, np.arange(5), Pass(5, 4000, seconds, 1000), (), 0, 0.0, seconds, 0.0)
    for _ in range(100):
        planner.observe(verified)
    assert planner.plain_cost(verified).each == pytest.approx(0.02 + 4000e-5)


# -- how many of a frontier ------------------------------------------------------------------------------------------


def best_worth(values: list[tuple[float, float]], seconds: np.ndarray, time_price: float) -> float:
    """values: (worth, how many of it). The best of cutting the values, best bin first, after any bin."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for value, many in values:
        bins[min(int((1 - min(value, 1)) * BINS), BINS - 1)].append((value, many))
    count = total = 0.0
    best = -time_price * seconds[0]
    for each in bins:
        count += sum(many for _, many in each)
        total += sum(value * many for value, many in each)
        best = max(best, total - time_price * float(np.interp(count, np.arange(len(seconds)), seconds)))
    return best


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([0.0, 1e-4, 1e-3, 4e-3]),
    st.sampled_from([0.0, 5e-4, 3e-3]),
)
def test_the_number_to_expand_is_the_best_of_those_tried(seed, count, size, each, draft_each):
    rng = np.random.default_rng(seed)
    children = -np.sort(-rng.uniform(0, 1, (3, 2, 4)), axis=1)
    acceptance = Acceptance(random_acceptance(0).table, children)
    steps = rng.choice([0, each, 4 * each], 7)
    target, settings = Curve(SIZES, 0.01 + np.cumsum([0, *steps])), replace(SHAPE, width=2)
    planner = planner_of(target, linear(draft_each, draft_each), count, acceptance, settings)
    candidates = Candidates(SuperTree.from_roots(np.zeros(count)), acceptance, np.ones(count), np.full(count, 9))
    tokens = np.tile(np.arange(3), (count, 1))
    candidates.add(np.arange(count), np.log(np.sort(rng.uniform(0, 0.6, (count, 3)))[:, ::-1]), tokens, 3)
    load, depth = load_of(count), int(rng.integers(0, 3))
    model = planner.learner.model(load, settings)
    time_price = model.time_price
    frontier = -np.sort(-rng.uniform(0, 1.1, size))
    entries = np.cumsum(rng.integers(1, 4, size))
    search = LevelSearch(model, candidates, model.verifying(200), time_price)
    got = search.worth_expanding(frontier, depth, entries)

    now = [(float(v), 1.0) for v in candidates.value[count:]]
    seconds = np.array([planner.costs.target(count + k) for k in range(200)])
    nets = {0: 0.0}
    for number in {*[2**i for i in range(size.bit_length()) if 2**i <= size], size}:
        later = list(now)
        above = np.ones(4)
        for level in range(min(TUNING.horizon, 3 - depth)):
            share = above * children[depth + level]
            later += [(min(f * s, 1.0), 0.25) for f in frontier[:number] for s in share.reshape(-1).tolist()]
            above = share[0]
            added = best_worth(later, seconds, time_price) - best_worth(now, seconds, time_price)
            cost = time_price * (level + 1) * planner.costs.draft(int(entries[number - 1]))
            nets[number] = max(nets.get(number, -np.inf), added - cost)
    assert got in nets
    assert nets[got] == pytest.approx(max(nets.values()), abs=1e-6)


# -- plans -----------------------------------------------------------------------------------------------------------


@st.composite
def servings(
    draw, settings: GoodputSettings = SHAPE, changes: tuple[float, ...] = (0.0,)
) -> tuple[GoodputPlanner, SeededDraft, StepContext, Chains | None]:
    """Return a planner whose machine charges one of ``changes`` for a pass of another size, and what it has to plan
    for.
    """
    seeds = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True))
    count, rng = len(seeds), np.random.default_rng(seeds[0])
    draft = SeededDraft(seeds, spread=draw(st.sampled_from([0.05, 0.3])), missing=draw(st.sampled_from([0.0, 0.3])))
    each, draft_each = draw(st.sampled_from([0.0, 1e-4, 1e-3, 0.02])), draw(st.sampled_from([0.0, 1e-4, 1e-3, 0.02]))
    acceptance = random_acceptance(draw(st.integers(0, 99)), SHAPE.max_depth)
    slots = rng.permutation(6)[:count]
    max_draft_len, draft_lag, prompt_tokens = (
        rng.integers(0, 6, count),
        rng.integers(1, 30, count),
        int(rng.integers(0, 9)),
    )
    load = load_of(
        count, slots=slots, max_draft_len=max_draft_len, draft_lag=draft_lag, context=100, prompt_tokens=prompt_tokens
    )
    chains = rng.integers(0, 12, (count, SHAPE.max_depth))
    chains[:, 0] = [draft.children(request, ())[1][rng.integers(0, 2)] for request in range(count)]
    chains[rng.random(count) < 0.3] = -1
    copied = copied_chains(chains, np.log(rng.uniform(0.1, 0.9, count)))
    copied = copied if draw(st.booleans()) else None
    planner = planner_of(linear(0.01, each), linear(draft_each, draft_each), 6, acceptance, settings, copied)
    planner.learner.costs.change = draw(st.sampled_from(changes))
    return planner, draft, load, copied


@given(servings())
def test_plans_are_trees_that_the_loop_can_verify(case):
    planner, draft, load, copied = case
    count = len(load.slots)
    plan = planner.plan(np.arange(30, 30 + count), draft, load)
    tree = plan.tree
    assert (np.diff(tree.request) >= 0).all()
    roots = np.flatnonzero(tree.parent < 0)
    assert tree.token[roots].tolist() == list(range(30, 30 + count))
    assert tree.request[roots].tolist() == list(range(count))
    assert (tree.depth[roots] == 0).all()
    assert plan.probability[roots].tolist() == [1] * count
    assert tree.sizes.max() <= SHAPE.per_request
    below = np.flatnonzero(tree.parent >= 0)
    above = tree.parent[below]
    assert (above < below).all()
    assert (tree.depth[below] == tree.depth[above] + 1).all()
    assert (tree.depth <= load.max_draft_len[tree.request]).all()
    assert (plan.probability[below] <= plan.probability[above]).all()
    paths = [(int(tree.request[node]), drafted(tree, node)) for node in range(len(tree))]
    assert len(set(paths)) == len(paths)
    expanded = np.bincount(draft.expanded, minlength=count)
    assert expanded.max() <= 1 + SHAPE.beams * (SHAPE.max_depth - 1)
    assert not expanded[load.max_draft_len == 0].any()
    for node in below:  # who is said to have proposed it has
        request, path = paths[node]
        head = path[-1] in draft.children(request, path[:-1])[1][: SHAPE.width]
        copy = copied is not None and path == tuple(copied.tokens[request, : len(path)])
        assert head if tree.source[node] == DRAFT else copy if tree.source[node] == LOOKUP else head and copy


@given(servings(goodput_settings("goodput-exact", vars(SHAPE)), changes=(0.0, 4.0)))
def test_exact_plans_are_one_chain_a_request(case):
    planner, draft, load, _ = case
    plan = planner.plan(np.arange(30, 30 + len(load.slots)), draft, load)
    below = np.flatnonzero(plan.tree.parent >= 0)
    assert (plan.tree.parent[below] == below - 1).all()
    assert (plan.probability[below] > 0).all()
    assert (plan.tree.depth <= load.max_draft_len[plan.tree.request]).all()


def test_who_fell_behind_is_preferred():
    planner = planner_of(linear(0.01, 2e-3), linear(1e-4, 1e-5), 2)
    for _ in range(200):
        planner.learner.history.observe(np.arange(2), np.array([1, 4]), 0.01)
    plan = planner.plan(np.zeros(2), steady(2, 0.8, 0.1, 0.05), load_of(2))
    slow, fast = plan.tree.sizes
    assert slow > fast


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), st.floats(0.1, 20.0), st.floats(1.0, 3.0), st.data())
def test_a_node_that_does_not_pay_never_will(values, time_price, power, data):
    """Where a node costs more the more there are, whatever further candidates come."""
    seconds = 0.004 * np.arange(81) ** power
    known = np.sort(np.array(values))[::-1]
    paying = paying_nodes(known, seconds, time_price)
    if paying == len(known):
        return
    minimum = known[paying]
    assume(minimum < time_price * (seconds[paying + 1] - seconds[paying]) - 1e-9)  # else rounding decides
    more = np.array(data.draw(st.lists(st.floats(0.0, 1.0), max_size=40)))
    count = paying_nodes(np.concatenate((known, more)), seconds, time_price)
    assert count <= paying + int((more >= minimum).sum())


class Ahead(Recorded):
    """A draft that runs several levels at once, down to ``depth``."""

    looks_ahead, depth = True, 0

    def look_ahead(self, depth: int, beams: int, width: int, maximum: int) -> None:
        self.depth = depth


def looked_ahead(level_seconds: float) -> Ahead:
    planner = planner_of(linear(1.0, 0.001), flat(0.02), 1, settings=replace(SHAPE, max_depth=8))
    planner.learner.history.level_seconds = level_seconds
    draft = Ahead(SteadyDraft([(0.8, 0.1)]))
    planner.plan(np.zeros(1), draft, load_of(1, max_draft_len=np.full(1, 99)))
    return draft


def test_every_level_of_a_device_is_worth_the_hosts_time_too():
    depths = [looked_ahead(seconds).depth for seconds in (0.0, 0.05, 0.2)]
    assert depths == sorted(set(depths), reverse=True)
    assert depths[-1] > 0


def test_no_level_is_read_that_a_device_has_not_drafted():
    draft = looked_ahead(0.05)
    assert draft.passes == draft.depth < 8
