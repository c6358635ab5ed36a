"""Allocation against the rule in words, and against every other choice there is."""

from itertools import chain, combinations

import numpy as np
import pytest
from forests import nodes_of, path_to, super_trees
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.speculation.echo.pivot import allocate
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.super_tree import SuperTree


def settings_of(budget: int | None, per_request: int = 64) -> EchoSettings:
    return EchoSettings(max_depth=9, beams=1, width=1, budget=budget, per_request=per_request)


def best_first(tree: SuperTree, nodes: list[int]) -> list[int]:
    return sorted(nodes, key=lambda node: (-tree.score[node], node))


def claims(tree: SuperTree, reach: list[int]) -> set[int]:
    """Each request's path down to its reach."""
    return {node for end in reach for node in path_to(tree, end)}


def size(tree: SuperTree, nodes: set[int], request: int) -> int:
    return sum(int(tree.request[node]) == request for node in nodes)


def widened(tree: SuperTree, taken: set[int], limits: EchoSettings) -> set[int]:
    """Then the best candidate under a taken node, one after the other, where its request may have one more."""
    taken = set(taken)
    while len(taken) < limits.budget:
        under = [n for n in range(len(tree)) if n not in taken and int(tree.parent[n]) in taken]
        under = [n for n in under if size(tree, taken, tree.request[n]) < limits.per_request]
        if not under:
            break
        taken.add(best_first(tree, under)[0])
    return taken


def is_closed(tree: SuperTree, nodes: set[int]) -> bool:
    return all(int(tree.parent[node]) in nodes | {-1} for node in nodes)


def within_limit(tree: SuperTree, nodes: set[int], limits: EchoSettings) -> bool:
    return all(size(tree, nodes, request) <= limits.per_request for request in range(tree.num_requests))


@st.composite
def trees_and_claims(draw, **sizes) -> tuple[SuperTree, list[int], EchoSettings]:
    """Return a tree, a node that each request reaches, and settings whose budget and limit pay for the way there."""
    tree = draw(super_trees(**sizes))
    reach = [draw(st.sampled_from(nodes_of(tree, request))) for request in range(tree.num_requests)]
    budget = len(claims(tree, reach)) + draw(st.integers(0, 12))
    longest = 1 + int(tree.depth[reach].max())
    per_request = draw(st.sampled_from([longest, longest + 2, 64]))
    return tree, reach, settings_of(budget, per_request)


@given(trees_and_claims())
def test_shared_budget_is_depth_first_then_width(case):
    tree, reach, limits = case
    nodes = allocate(tree, np.array(reach), limits)
    assert nodes.tolist() == sorted(widened(tree, claims(tree, reach), limits))
    assert is_closed(tree, set(nodes.tolist()))
    assert set(range(tree.num_requests)) <= set(nodes.tolist())
    assert len(nodes) == min(limits.budget, np.minimum(tree.sizes, limits.per_request).sum())
    assert np.bincount(tree.request[nodes]).max() <= limits.per_request


@given(trees_and_claims(max_requests=3, max_nodes=8))
def test_no_other_choice_that_honours_the_claims_is_worth_more(case):
    tree, reach, limits = case
    nodes = allocate(tree, np.array(reach), limits)
    claimed = claims(tree, reach)
    others = [node for node in range(len(tree)) if node not in claimed]
    choices = (claimed | set(more) for more in combinations(others, len(nodes) - len(claimed)))
    allowed = (choice for choice in choices if is_closed(tree, choice) and within_limit(tree, choice, limits))
    worth = max(sum(tree.score[list(choice)]) for choice in allowed)
    assert sum(tree.score[nodes]) == worth


@given(super_trees(), st.integers(1, 8))
def test_static_gives_each_request_its_own_best(tree, per_request):
    roots = np.arange(tree.num_requests)
    nodes = allocate(tree, roots, settings_of(None, per_request)).tolist()
    best = [best_first(tree, nodes_of(tree, request))[:per_request] for request in range(tree.num_requests)]
    assert nodes == sorted(chain.from_iterable(best))
    assert is_closed(tree, set(nodes))


@pytest.mark.parametrize("budget", [0, 1, 4])
def test_a_budget_short_of_the_roots_still_advances_every_request(budget):
    tree = SuperTree.from_roots(np.arange(5))
    nodes = allocate(tree, np.arange(5), settings_of(budget))
    assert nodes.tolist() == [0, 1, 2, 3, 4]
