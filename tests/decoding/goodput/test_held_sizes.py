"""Sizes: which is held on machines where another size costs extra, for how long, and what a held size verifies."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Server, linear
from seeded_draft import SteadyDraft

from echo_trt.decoding.goodput.acceptance import Acceptance
from echo_trt.decoding.goodput.costs import NEAR, Costs, Curve
from echo_trt.decoding.goodput.planner import GoodputPlanner, Verifications
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.goodput.sizes import HELD, Sizes, load_of
from echo_trt.decoding.goodput.turns import HELD_TURN, PLAIN_TURN
from echo_trt.decoding.planner import Load, Pass

SHAPE = GoodputSettings(max_depth=5, beams=2, width=3)
FORESEEN = Acceptance.uncalibrated(SHAPE.max_depth).foreseen(SHAPE.width)


def costs_of(target: Curve, change: float = 4.0, granule: int = 4, draft: float = 0.5) -> Costs:
    return Costs(target, linear(draft, 0.0), change=change, granule=granule)


def planner_of(costs: Costs, count: int) -> GoodputPlanner:
    return GoodputPlanner("goodput", SHAPE, costs, Acceptance.uncalibrated(SHAPE.max_depth), count)


def told(
    sizes: Sizes, costs: Costs, requests: int, probability: np.ndarray, drafting: float = 1.0, searches: int = 8 * HELD
) -> list[int | None]:
    """What is held over ``searches``, each of which finds these candidates."""
    nodes, best = [], np.sort(probability)[::-1]
    for _ in range(searches):
        held = sizes.nodes(requests, 0, costs, 0.0, FORESEEN)
        nodes.append(held)
        sizes.observe(probability, requests, drafting)
        if held is not None:
            milliseconds = costs.target(requests + held) + drafting * (held > 0)
            sizes.spent(1e-3 * milliseconds, 1 + best[:held].sum() / requests)
    return nodes


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=40), st.integers(1, 40), st.floats(0.05, 2.0))
def test_the_size_that_is_held_would_have_brought_most_a_second(probability, requests, each):
    costs = costs_of(linear(10.0, each), draft=1e-6)
    nodes = told(Sizes(), costs, requests, np.array(probability), 1e-6, searches=24 * HELD)[-2 * HELD :]
    chosen = requests + max(set(nodes), key=nodes.count)  # now and then it looks whether plain decoding is still best
    best = np.sort(probability)[::-1]

    def rate(size: int) -> float:
        drafted = best[: size - requests].sum()
        return (requests + drafted) / costs.target(size)

    allowed = [requests, *(size for size in range(4, 257, 4) if size > requests)]
    shown = 0.93 if requests >= 4 else 0.85  # what a few requests gain, turns may take for their texts being easy
    assert rate(chosen) > shown * max(rate(size) for size in allowed)


def test_a_size_that_has_lost_makes_room_for_a_better_one():
    """12 tokens lose 2 %, 8 of them gain 2 %: what is held stays where others promise little more, unless it loses."""
    costs = costs_of(linear(10.0, 0.33), draft=1e-6)
    nodes = told(Sizes(), costs, 4, np.array([0.1875, *[0.125] * 4]), 1e-6, searches=24 * HELD)[-2 * HELD :]
    assert max(set(nodes), key=nodes.count) == 4


def test_nothing_is_held_where_another_size_costs_nothing():
    assert set(told(Sizes(), costs_of(linear(10.0, 0.0), change=0.0), 2, np.full(8, 0.5))) == {None}


@pytest.mark.parametrize(("each", "pays"), [(0.2, True), (9.0, False)])
def test_a_load_that_is_new_begins_with_what_the_calibration_foresees(each, pays):
    sizes, costs = Sizes(), costs_of(linear(10.0, each))
    told_of = []
    for _ in range(PLAIN_TURN + HELD_TURN):
        told_of.append(sizes.nodes(4, 0, costs, 0.0, FORESEEN))
        sizes.spent(0.01, 1.0)
    nodes = max(told_of)
    assert told_of == [0] * PLAIN_TURN + [nodes] * HELD_TURN
    assert (nodes > 0) == pays
    if pays:
        brought = FORESEEN.best(np.array([nodes]), 4)[0]
        assert (4 + brought) / costs.target(4 + nodes) > 4 / costs.target(4)


SHARES = np.array([[[0.2, 0.8], [0.1, 0.3]], [[0.5, 0.5], [0.4, 0.4]]])  # [levels, w, quantiles]
TREES = np.array([[0.2, 0.1, 0.1, 0.08], [0.8, 0.4, 0.32, 0.3]])  # with what the best child's children are worth


def test_the_best_nodes_of_a_tree_are_foreseen():
    foreseen = Acceptance(Acceptance.uncalibrated(2).table, SHARES).foreseen(2)
    assert foreseen.best(np.arange(5), 1) == pytest.approx([0.0, *TREES.mean(axis=0).cumsum()])


@pytest.mark.parametrize("requests", [2, 4, 6, 40])
def test_the_best_nodes_of_many_trees_are_foreseen(requests):
    shares = np.concatenate((SHARES, np.full((1, 2, 2), 1e-12)))  # every tree twice
    foreseen = Acceptance(Acceptance.uncalibrated(3).table, shares).foreseen(2)
    nodes = np.arange(4 * requests + 1)
    best = foreseen.best(nodes, requests)
    each = np.array([foreseen.best(np.array([n]), 1)[0] for n in range(5)])
    assert np.all(np.diff(best) >= 0)
    assert best[-1] == pytest.approx(requests * TREES.sum() / 2)
    assert np.all(best[::requests] >= requests * each - 1e-9)  # who promises more gets more
    if requests == 40:  # all trees, several times
        assert best[requests] == pytest.approx(requests / 2 * (0.8 + 0.4))


def test_a_small_size_says_nothing_of_what_more_would_have_brought():
    found = {}
    for held in (8, 16):
        sizes, costs = Sizes(), costs_of(linear(10.0, 0.2))
        for _ in range(200):
            sizes.nodes(4, 0, costs, 0.0, FORESEEN)
            sizes.held, sizes._left = held, 9
            sizes.observe(np.full(held - 4, 0.5), 4, 1.0)
        found[held] = sizes._known[load_of(4)].brought
    assert found[8][1] == pytest.approx(2.0, rel=0.02)
    assert found[8][3] > found[8][1] + 0.5  # as was foreseen
    assert found[16][3] == pytest.approx(6.0, rel=0.02)


def test_texts_that_are_hard_are_so_for_larger_sizes_too():
    """Else a size that was never held looks better, the harder the texts are, until it has lost for a while."""
    sizes, costs = Sizes(), costs_of(linear(10.0, 0.2))
    sizes.nodes(4, 0, costs, 0.0, FORESEEN)
    known = sizes._known[load_of(4)]
    foreseen = known.brought.copy()
    for _ in range(300):
        known.learn(np.full(4, 0.1), 4, 1.0, 8)
    assert known.brought[1] == pytest.approx(0.4, rel=0.02)
    assert known.brought[2:] / foreseen[2:] == pytest.approx(known.brought[1] / foreseen[1])


def test_smaller_sizes_draft_less_than_the_one_that_is_held():
    sizes, costs = Sizes(), costs_of(linear(10.0, 0.2))
    sizes.nodes(4, 0, costs, 0.0, FORESEEN)
    known = sizes._known[load_of(4)]
    for _ in range(300):
        known.learn(np.full(28, 0.5), 4, 6.0, 32)
    drafting = known.drafting(4)
    assert drafting[7] == pytest.approx(6.0, rel=0.02)
    assert drafting[1:8] / known._usual(4)[1:8] == pytest.approx(drafting[7] / known._usual(4)[7])
    assert drafting[1] < 0.5 * drafting[7]


def test_passes_that_prepare_new_sizes_do_not_make_drafting_dear():
    sizes, costs = Sizes(), costs_of(linear(10.0, 0.2))
    for search in range(40):
        sizes.nodes(4, 0, costs, 0.0, FORESEEN)
        sizes.observe(np.full(8, 0.5), 4, 30.0 if search < 3 else 1.0)
    known = sizes._known[load_of(4)]
    learnt, usual = known.drafting(4)[sizes.held // 4 - 1], known._usual(4)[sizes.held // 4 - 1]
    assert min(usual, 1.0) <= learnt < 2 * max(usual, 1.0)


@pytest.mark.parametrize(("first", "now"), [(12, 10), (16, 14), (64, 54)])
def test_drafting_has_its_price_when_requests_have_left(first, now):
    """Of sizes that were no more than the roots before, too: they had looked as if their nodes came for nothing."""
    costs, candidates, best = costs_of(linear(10.0, 0.2), draft=1.5), np.full(now, 0.3), {}
    for before in (first, now):
        sizes = Sizes()
        assert load_of(before) == load_of(now)
        sizes.nodes(before, 0, costs, 0.0, FORESEEN)
        known = sizes._known[load_of(now)]
        for _ in range(400):
            known.learn(candidates, now, 6e-3, 3 * now)
        best[before] = known.best(now, 0, costs, 0.0, 0.0)
    assert best[first] == pytest.approx(best[now])


@pytest.mark.parametrize("lasts", [8, 15, 30])
def test_one_request_that_comes_and_goes_beside_another_hides_no_loss(lasts):
    """A change of load every few iterations leaves no turn of either whole, yet what is foreseen is set right."""
    sizes, costs, plain = Sizes(), costs_of(linear(0.01, 1e-4), draft=1e-4), []
    for iteration in range(6000):
        requests = 1 + iteration // lasts % 2
        held = sizes.nodes(requests, 0, costs, 0.0, FORESEEN)
        sizes.spent(0.01, 1.0 if held == 0 else 0.7)
        plain.append(held == 0)
        if held:
            sizes.observe(np.full(8, 0.5), requests, 1e-4)
    assert np.mean(plain[2000:]) > 0.9


def test_where_nothing_pays_it_is_plain_and_looks_again_now_and_then():
    sizes, costs = Sizes(), costs_of(linear(10.0, 9.0))
    held = told(sizes, costs, 4, np.full(8, 0.1))
    assert 0 in held
    assert 0 < np.mean(np.array(held) > 0) < 0.25
    costs.target = linear(10.0, 0.1)
    assert np.mean(np.array(told(sizes, costs, 4, np.full(8, 0.9), searches=80 * HELD)) > 0) > 0.5


@pytest.mark.parametrize("lost", [0.1, 2.0, 400.0])
def test_what_looking_loses_it_earns_before_it_looks_again(lost):
    sizes, costs = Sizes(), costs_of(linear(0.1, 0.09))
    seconds, trials = [], 0
    for _ in range(120 * HELD):
        before, speculates = sizes.held, sizes.nodes(4, 0, costs, 0.0, FORESEEN) > 0
        trials += speculates and before == 0
        plain = costs.target(4)
        seconds.append((plain * (1 + lost) if speculates else plain, plain))
        if speculates:
            sizes.observe(np.full(8, 0.1), 4, 1.0)
        sizes.spent(seconds[-1][0], 1.0)
    taken, plain = np.array(seconds).sum(axis=0)
    assert trials > 1
    assert taken - plain < 0.012 * taken or trials < plain / 30 + 2


def test_a_size_lasts_when_requests_come_and_go_and_not_when_the_load_is_another():
    sizes, costs = Sizes(), costs_of(linear(10.0, 0.2))
    for requests in (4, 16):
        told(sizes, costs, requests, np.full(64, 0.5))
    sizes.nodes(4, 0, costs, 0.0, FORESEEN)
    held = sizes.held
    assert held > 4
    assert [sizes.nodes(requests, 0, costs, 0.0, FORESEEN) for requests in (3, 4, 5, 4)] == [
        held - n for n in (3, 4, 5, 4)
    ]
    assert sizes.nodes(16, 0, costs, 0.0, FORESEEN) == sizes.held - 16
    assert sizes.held != held


def test_loads_a_few_steps_apart_are_told_from_each_other():
    """7 requests gain by drafts and 17 don't, whatever was before: 11, which is near both."""
    sizes, costs = Sizes(), costs_of(linear(10.0, 0.5), draft=0.01)
    good, bad = np.full(24, 0.7), np.full(24, 0.05)
    told(sizes, costs, 11, np.full(24, 0.3), 0.01)
    for _ in range(6):
        few = told(sizes, costs, 7, good, 0.01, searches=4 * HELD)
        many = told(sizes, costs, 17, bad, 0.01, searches=4 * HELD)
    assert np.mean(np.array(few) > 0) > 0.8
    assert np.mean(np.array(many) > 0) < 0.2


def test_a_size_that_leaves_no_room_for_drafts_is_chosen_anew():
    sizes, costs = Sizes(), costs_of(linear(10.0, 0.1), draft=0.01)
    told(sizes, costs, 5, np.full(24, 0.8), 0.01)
    while sizes.held == 0:
        told(sizes, costs, 5, np.full(24, 0.8), 0.01, searches=1)
    sizes.held = sizes._known[load_of(5)].turns.size = 6
    assert sizes.nodes(6, 0, costs, 0.0, FORESEEN) > 0 or sizes.held == 0


def test_a_held_size_is_filled_and_more_is_not_verified():
    assert Verifications(costs_of(linear(1.0, 1.0)), _load(2), held_nodes=5).upto(900).tolist() == [0.0] * 6


def test_where_changes_cost_a_planner_keeps_to_one_size():
    changes = {}
    for change in (0.0, 6.0):
        costs = Costs(linear(10.0, 0.3), linear(0.3, 0.0), change=change, granule=4)
        server = Server(planner_of(costs, 2), linear(10.0, 0.3), linear(0.3, 0.0), (0.6, 0.2), 2)
        server.run(4 * HELD)
        server.run(4 * HELD)
        sizes = -(-np.array(server.sizes) // 4)
        changes[change] = np.mean(sizes[1:] != sizes[:-1])
    assert changes[0.0] > 0.1
    assert changes[6.0] < 0.06  # turns of plain decoding among them


def _load(count: int) -> Load:
    return Load(np.arange(count), np.full(count, 9), np.ones(count, np.int64), 0)


def held(target: Curve, right: list[float], count: int, granule: int = 4, draft: Curve | None = None) -> Server:
    """A machine on which another size costs a third of a pass, and its planner."""
    draft = draft or linear(1e-3, 1e-5)
    costs = Costs(target, draft, change=3e-3, granule=granule)
    return Server(planner_of(costs, count), target, draft, right, count)


@pytest.mark.parametrize("count", [1, 4, 32])
def test_where_no_size_pays_looking_costs_a_hundredth(count):
    server = held(linear(0.01, 3e-3), [0.1, 0.05, 0.02], count)
    server.run(200)
    server.run(4000)
    assert server.drafts > 4
    assert server.rate > 0.985 * count / server.target(count)


@pytest.mark.parametrize("count", [1, 4])
def test_a_draft_that_becomes_good_is_found_again(count):
    server = held(linear(0.01, 1e-4), [0.02, 0.01, 0.01], count, draft=linear(4e-3, 1e-6))
    server.run(400)
    server.q = server.right = [0.9, 0.05, 0.01]
    server.run(4000)
    assert server.run(200).rate > 1.3 * count / server.target(count)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_size_that_loses_is_given_up_whatever_is_known_of_it(count):
    """The target takes longer for trees than its passes, as the tables know them, do."""
    server = held(linear(0.01, 1e-5), [0.4, 0.05, 0.01], count)
    observe = server.planner.observe
    server.planner.observe = lambda done: observe(replace(done, target=Pass(count, 0, server.target(count))))
    server.target = Curve([count, count + 1, 999], [0.01, 0.03, 0.03])
    server.run(200)
    server.run(3000)
    assert server.rate > 0.97 * count / server.target(count)


def following(server: Server) -> Server:
    """The curve of the target follows what is observed as a measured one does."""
    target = server.planner.costs.target
    server.planner.costs.target = Curve(target.sizes, target.seconds, reach=NEAR, together=True)
    return server


@pytest.mark.parametrize("count", [4, 16, 32])
def test_that_larger_passes_take_longer_than_the_table_says_is_found_out(count):
    """It was measured while memory was slow, so that tokens seemed free: what is held cannot show that it loses."""
    server = following(held(linear(0.01, 1e-5), [0.45, 0.1, 0.05], count))
    server.target = Curve([1, count, 2 * count, 999], [0.01, 0.01, 0.016, 0.16])
    server.run(1200)
    server.run(3000)
    assert server.rate > 0.97 * count / server.target(count)


@pytest.mark.parametrize("lasts", [40, 200])
def test_a_machine_that_changes_its_speed_is_no_reason_to_decode_plainly(lasts):
    """All its passes, drafts too, take twice as long for some seconds, and then do not."""
    draft, rates = linear(1e-3, 1e-5), {}
    for target in (linear(0.01, 1e-4), linear(0.01, 1.0)):
        server = following(held(target, [0.6, 0.1, 0.05], 4, draft=draft))
        server.run(200)
        tokens = seconds = 0.0
        for turn in range(40):
            factor = 1 + turn % 2
            server.target = Curve(target.sizes, factor * target.seconds)
            server.draft = Curve(draft.sizes, factor * draft.seconds)
            server.run(lasts)
            tokens, seconds = tokens + server.tokens, seconds + server.seconds
        rates[float(target(2))] = tokens / seconds
    fast, plain = rates.values()
    assert fast > 1.25 * plain


@pytest.mark.parametrize(("change", "fills"), [(4.0, True), (0.1, False)])
def test_a_pass_that_finds_less_keeps_the_size_that_is_held(change, fills):
    """Where to go to its own size and back would take longer."""
    planner = planner_of(costs_of(linear(10.0, 0.2), change), 2)
    planner.sizes.nodes = lambda *_: 10
    for room in (9, 1):  # of a draft token each there are two
        load = Load(np.arange(2), np.full(2, room), np.ones(2, np.int64), 0)
        plan = planner.plan(np.zeros(2), SteadyDraft([[0.9, 0.8]] * 2), load)
        assert len(plan.tree) == (12 if room == 9 else 6)
        assert plan.padded_to == (12 if room == 9 or fills else 0)


@pytest.mark.parametrize("least", [1, 4])
def test_no_size_is_below_what_passes_are_filled_up_to(least):
    sizes, costs = Sizes(), Costs(linear(10.0, 0.2), linear(0.5, 0.0), change=4.0, granule=2, least=least)
    sizes.nodes(1, 0, costs, 0.0, FORESEEN)
    assert sizes._known[load_of(1)].sizes[:3].tolist() == [max(least, 2) + extra for extra in (0, 2, 4)]


@pytest.mark.parametrize("granule", [1, 4])
@pytest.mark.parametrize("count", [60, 130, 300])
def test_many_requests_speculate_where_it_pays(count, granule):
    server = held(Curve([1, 999], [0.01, 0.011]), [0.7, 0.1, 0.05], count, granule, draft=linear(1e-3, 1e-7))
    server.run(100)
    assert server.run(200).rate > 1.3 * count / server.target(count)
