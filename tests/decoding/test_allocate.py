"""Allocation against the rule in words, and against every other choice there is."""

from itertools import chain, combinations

import numpy as np
import pytest
from forests import nodes_of, path_to, super_trees
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_trt.decoding.allocate import allocate
from echo_trt.decoding.policies import Policy
from echo_trt.decoding.super_tree import SuperTree


def best_first(tree: SuperTree, nodes: list[int]) -> list[int]:
    return sorted(nodes, key=lambda node: (-tree.score[node], node))


def claims(tree: SuperTree, reach: list[int]) -> set[int]:
    """Each request's best path down to its reach."""
    claimed = set()
    for request, depth in enumerate(reach):
        level = [node for node in nodes_of(tree, request) if tree.depth[node] == depth]
        claimed.update(path_to(tree, best_first(tree, level)[0]))
    return claimed


def widened(tree: SuperTree, taken: set[int], budget: int) -> set[int]:
    """Then the best candidate under a taken node, one after the other."""
    taken = set(taken)
    while len(taken) < budget:
        under = [n for n in range(len(tree)) if n not in taken and int(tree.parent[n]) in taken]
        if not under:
            break
        taken.add(best_first(tree, under)[0])
    return taken


def is_closed(tree: SuperTree, nodes: set[int]) -> bool:
    return all(int(tree.parent[node]) in nodes | {-1} for node in nodes)


@st.composite
def trees_and_claims(draw, **sizes) -> tuple[SuperTree, list[int], int]:
    """A tree, a reach for each request and a budget that pays for it."""
    tree = draw(super_trees(**sizes))
    deepest = [max(tree.depth[nodes_of(tree, request)]) for request in range(tree.num_requests)]
    reach = [draw(st.integers(0, int(depth))) for depth in deepest]
    return tree, reach, sum(reach) + tree.num_requests + draw(st.integers(0, 12))


@given(trees_and_claims())
def test_shared_budget_is_depth_first_then_width(case):
    tree, reach, budget = case
    nodes = allocate(tree, np.array(reach), Policy("echo", max_depth=9, budget=budget))
    assert nodes.tolist() == sorted(widened(tree, claims(tree, reach), budget))
    assert is_closed(tree, set(nodes.tolist()))
    assert set(range(tree.num_requests)) <= set(nodes.tolist())
    assert len(nodes) == min(budget, len(tree))


@settings(max_examples=50)
@given(trees_and_claims(max_requests=3, max_nodes=8))
def test_no_other_choice_that_honours_the_claims_is_worth_more(case):
    tree, reach, budget = case
    nodes = allocate(tree, np.array(reach), Policy("echo", max_depth=9, budget=budget))
    claimed = claims(tree, reach)
    others = [node for node in range(len(tree)) if node not in claimed]
    choices = (claimed | set(more) for more in combinations(others, len(nodes) - len(claimed)))
    worth = max(sum(tree.score[list(choice)]) for choice in choices if is_closed(tree, choice))
    assert sum(tree.score[nodes]) == worth


@given(super_trees(), st.integers(1, 8))
def test_static_gives_each_request_its_own_best(tree, per_request):
    reach = np.zeros(tree.num_requests, np.int64)
    nodes = allocate(tree, reach, Policy("static", max_depth=9, per_request=per_request)).tolist()
    best = [best_first(tree, nodes_of(tree, request))[:per_request] for request in range(tree.num_requests)]
    assert nodes == sorted(chain.from_iterable(best))
    assert is_closed(tree, set(nodes))


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_budget_short_of_the_roots_still_advances_every_request(budget):
    tree = SuperTree.from_roots(np.arange(5))
    nodes = allocate(tree, np.zeros(5, np.int64), Policy("echo", max_depth=9, budget=budget))
    assert nodes.tolist() == [0, 1, 2, 3, 4]
