"""Growth against a request-by-request, level-by-level retelling, and what it must never do."""

import numpy as np
import pytest
from forests import nodes_of
from hypothesis import given
from hypothesis import strategies as st
from seeded_draft import NoDraft, PathDraft, SeededDraft, SteadyDraft, drafted

from echo_trt.speculation.echo.grow import grow
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.policies import echo_settings
from echo_trt.speculation.super_tree import SuperTree

PAPER = ("static", "echo")
AMPLE = 10**6
Paths = dict[tuple[int, ...], np.float32]  # drafted tokens -> score


def settings_of(name: str, budget: int = 16, **changes) -> EchoSettings:
    numbers = {
        "budget": budget,
        "per_request": 64,
        "max_depth": 5,
        "beams": 2,
        "width": 3,
        "gates": {1: 0.3, 3: 0.2},
        "static": {"depth": 3, "top_k": 3, "tokens": 8},
    }
    return echo_settings(name, numbers | changes)


def grown(draft: PathDraft, limits: EchoSettings, max_draft_len: list[int]) -> tuple[SuperTree, np.ndarray]:
    return grow(np.arange(len(max_draft_len)), draft, limits, np.array(max_draft_len), draft.looks_ahead)


def paths_by_request(tree: SuperTree) -> list[Paths]:
    return [
        {drafted(tree, node): tree.score[node] for node in nodes_of(tree, request)}
        for request in range(tree.num_requests)
    ]


def retold(
    draft: PathDraft, limits: EchoSettings, max_draft_len: list[int]
) -> tuple[list[Paths], list[tuple[int, ...]]]:
    """Return what ``grow`` promises, one request and one node at a time."""
    trees: list[Paths] = [{(): np.float32(0)} for _ in max_draft_len]
    reach: list[tuple[int, ...]] = [()] * len(max_draft_len)
    frontiers = {request: [()] for request, length in enumerate(max_draft_len) if length > 0}
    spare = limits.spare(len(max_draft_len))
    for depth in range(1, limits.max_depth + 1):
        if spare == 0:
            break
        levels: dict[int, list[tuple[int, ...]]] = {}
        for request, frontier in frontiers.items():
            level: Paths = {}
            for path in frontier:
                for log_q, token in list(zip(*draft.children(request, path), strict=True))[: limits.width]:
                    if log_q > -np.inf:
                        level[(*path, int(token))] = trees[request][path] + log_q
            trees[request] |= level
            if level and np.exp(max(level.values())) > limits.gates.get(depth, 0):
                levels[request] = sorted(level, key=level.get, reverse=True)
        chosen = sorted(levels, key=lambda request: trees[request][levels[request][0]], reverse=True)
        if limits.budget is not None:
            chosen = chosen[:spare]
            spare -= len(chosen)
        for request in chosen:
            reach[request] = levels[request][0]
        frontiers = {request: levels[request][: limits.beams] for request in chosen if max_draft_len[request] > depth}
    return trees, reach


drafts = st.builds(
    SeededDraft,
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=6, unique=True),
    spread=st.sampled_from([0.05, 0.2, 0.6]),
    missing=st.sampled_from([0.0, 0.4]),
)


@st.composite
def drafts_and_room(draw) -> tuple[SeededDraft, list[int]]:
    draft = draw(drafts)
    return draft, [draw(st.integers(0, 7)) for _ in draft.seeds]


@given(drafts_and_room(), st.sampled_from(PAPER), st.sampled_from([0, 4, 7, 12, 20, AMPLE]))
def test_growth_is_what_it_promises(case, name, budget):
    draft, max_draft_len = case
    limits = settings_of(name, budget)
    tree, reach = grown(draft, limits, max_draft_len)
    want_trees, want_reach = retold(draft, limits, max_draft_len)
    assert paths_by_request(tree) == want_trees
    assert [drafted(tree, node) for node in reach] == want_reach
    assert np.isfinite(tree.score).all()  # a child of -inf never becomes a node
    assert all(tree.depth[node] <= max_draft_len[tree.request[node]] for node in range(len(tree)))


@given(drafts_and_room(), st.sampled_from(["static", "echo"]))
def test_a_request_drafts_no_more_rows_than_the_policy_says(case, name):
    draft, max_draft_len = case
    limits = settings_of(name, AMPLE)
    grown(draft, limits, max_draft_len)
    expanded = np.bincount(draft.expanded, minlength=1)
    assert expanded.max() <= 1 + limits.beams * (limits.max_depth - 1)


@pytest.mark.parametrize("name", PAPER)
def test_without_room_no_draft_is_asked(name):
    tree, _ = grow(np.arange(3), NoDraft(), settings_of(name, AMPLE), np.array([0, 0, -1]))
    assert len(tree) == 3


def test_probabilities_rounded_above_one_do_not_lift_a_child_over_its_parent():
    """A log-softmax in low precision can end a little above 0."""
    draft = SteadyDraft([[1.06, 0.01]])
    tree, _ = grown(draft, settings_of("echo"), [9])
    below = np.flatnonzero(tree.parent >= 0)
    assert (tree.score[below] <= tree.score[tree.parent[below]]).all()


# -- on a device ---------------------------------------------------------------------------------------------------

QWEN3_8B = {"max_depth": 8, "beams": 10, "width": 20, "gates": {1: 0.2, 2: 0.3, 4: 0.5}, "budget": 256}


@pytest.mark.parametrize(
    ("depth", "requests", "spare", "beams", "stops", "reached"),
    [
        (0, 64, 192, 4, {}, 1),  # the next gate
        (2, 48, 96, 10, {}, 4),
        (4, 33, 128, 4, {}, 8),
        (4, 32, 33, 10, {}, 6),  # the budget is used up before
        (0, 12, 244, 10, {}, 8),  # a level of 120 rows takes no longer than one of ten
        (0, 12, 24, 10, {}, 2),
        (1, 12, 24, 10, {}, 4),
        (0, 1, 59, 10, {}, 8),
        (0, 1, 59, 10, {1: 0.6}, 1),  # one request's gate ends the draft
        (1, 1, 58, 10, {1: 0.6}, 8),
        (0, 1, 59, 10, {1: 0.1, 2: 0.2, 4: 0.2}, 4),  # one in five saves four levels
        (0, 1, 59, 10, {1: 0.2, 2: 0.3, 4: 0.2}, 2),  # levels up to the next wait
        (2, 1, 57, 10, {1: 0.2, 2: 0.3, 4: 0.2}, 4),
        (0, 12, 244, 10, {4: 0.9}, 8),
    ],
)
def test_how_far_a_device_drafts_in_one_go(depth, requests, spare, beams, stops, reached):
    settings = settings_of("echo", **QWEN3_8B)
    assert settings.reach(depth, requests, spare, stops) == reached
    first = max(depth, 1)
    drafts = [(shape.first, shape.levels, shape.beams) for shape in settings.level_shapes(requests)]
    assert (first, reached - first, beams) in drafts


def test_a_single_request_waits_at_each_gate_that_is_worth_it():
    """A text that passes all gates tells by the depths that are announced where the host waits."""
    announced = []

    class Announced(SteadyDraft):
        looks_ahead = True

        def look_ahead(self, depth, beams, width, maximum):
            announced.append(depth)

    draft, settings = Announced([[0.99, 0.01]]), settings_of("echo", **QWEN3_8B)
    for stops in ({}, {1: 0.2, 2: 0.3, 4: 0.2}, {1: 0.6, 2: 0.3, 4: 0.2}):
        grow(np.arange(1), draft, settings, np.array([9]), True, stops)
    assert announced == [8, 2, 4, 8, 1, 2, 4, 8]


@given(st.integers(1, 256), st.integers(60, 1024))
def test_beams_of_a_device_follow_what_the_budget_leaves(requests, budget):
    """They are those of the budget, or more up to the policy's, and at high load the head has three rows a token."""
    settings = settings_of("echo", **QWEN3_8B | {"budget": budget})
    beams, spare = settings.beams_for(requests), settings.spare(requests)
    assert min(10, -(-spare // requests) + 1) <= beams <= 10
    if spare <= 3 * requests:
        assert beams == 4


class GateByGate(SeededDraft):
    """A seeded draft that looks ahead: what it is asked for beyond the depth that was announced is an error."""

    looks_ahead, depth = True, 0

    def look_ahead(self, depth, beams, width, maximum):
        assert depth > self.depth
        self.depth = depth

    def expand(self, tree, nodes):
        assert tree.depth[nodes].max() < self.depth
        return super().expand(tree, nodes)


@given(
    name=st.sampled_from(PAPER),
    max_draft_len=st.lists(st.integers(0, 7), min_size=1, max_size=6),
    budget=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_gate_by_gate_the_claims_are_those_of_level_by_level(name, max_draft_len, budget, seed):
    """But for requests whose texts end before the budget that was left for them, which buys width instead."""
    settings = settings_of(name, budget)
    seeds = [seed + i for i in range(len(max_draft_len))]
    by_level = grown(SeededDraft(seeds), settings, max_draft_len)
    by_gate = grown(GateByGate(seeds), settings, max_draft_len)
    assert len(by_gate[0]) <= len(by_level[0])
    if max(max_draft_len) == min(max_draft_len):
        assert paths_by_request(by_gate[0]) == paths_by_request(by_level[0])
        assert by_gate[1].tolist() == by_level[1].tolist()
