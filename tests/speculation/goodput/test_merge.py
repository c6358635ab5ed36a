"""Chains of several sources in one tree, against a dictionary of paths."""

from __future__ import annotations

import numpy as np
import pytest
from forests import nodes_of
from hypothesis import given
from hypothesis import strategies as st
from machines import SHAPE, Copied, linear, load_of
from seeded_draft import SeededDraft, drafted

from echo_trt.speculation.chains import Chains
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED_START, Acceptance
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.goodput.optimiser.merge import SURE, merge
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.sources import BOTH, GRAMMAR, LOOKUP, NGRAM
from echo_trt.speculation.super_tree import SuperTree

Chain = tuple[int, list[int], float, int]  # the node above it, its tokens, P(accept) of each, and its source


def chains_of(*rows: Chain) -> Chains:
    length = max(len(tokens) for _, tokens, _, _ in rows)
    tokens = np.array([[*tokens, *[-1] * (length - len(tokens))] for _, tokens, _, _ in rows])
    log_p = np.repeat(np.log([[p] for _, _, p, _ in rows]), length, axis=1)
    above, source = np.array([row[0] for row in rows]), np.array([row[3] for row in rows], np.int8)
    return Chains(above, tokens, log_p, source)


def merged(proposals: list[Chains], roots: int = 2, room: int = 99, one_path: bool = False) -> Candidates:
    tree, acceptance = SuperTree.from_roots(np.zeros(roots)), Acceptance.uncalibrated(4, CALIBRATED_START)
    return Candidates(tree, acceptance, np.ones(roots), np.full(roots, room), proposals, one_path)


@st.composite
def proposals(draw) -> list[list[Chain]]:
    chain = st.tuples(
        st.integers(0, 2),
        st.lists(st.integers(0, 2), min_size=1, max_size=5),
        st.floats(0.05, 0.95),
        st.sampled_from([LOOKUP, NGRAM]),
    )
    return draw(st.lists(st.lists(chain, min_size=1, max_size=4), max_size=3))


@given(proposals(), st.integers(0, 5))
def test_a_path_is_one_node_whoever_proposes_it(several, room):
    tree = SuperTree.from_roots(np.zeros(3))
    found = merge(tree, np.ones(3), [chains_of(*rows) for rows in several], np.full(3, room))
    found.join(tree)
    chances, paths = {}, {}
    for root, tokens, p, _ in (row for rows in several for row in rows):
        for end in range(1, min(len(tokens), room) + 1):
            path = (root, *tokens[:end])
            chances[path] = 1 - (1 - chances.get(path, 0.0)) * (1 - p)
    for root in range(3):
        nodes = nodes_of(tree, root)
        paths |= {(root, *drafted(tree, node)): node - 3 for node in nodes if node >= 3}
        assert len(nodes) == len({drafted(tree, node) for node in nodes})
    assert paths.keys() == chances.keys()
    for path, node in paths.items():
        siblings = [other for other in chances if other[:-1] == path[:-1]]
        known = {other: min(chances[other], SURE) for other in siblings}
        odds = {other: chance / (1 - chance) for other, chance in known.items()}
        assert np.exp(found.log_p[node]) == pytest.approx(odds[path] / (1 + sum(odds.values())), rel=1e-3)
        assert sum(np.exp(found.log_p[paths[other]]) for other in siblings) < 1
        below = {paths[other] for other in paths if other[: len(path)] == path}
        assert below == set(range(node, found.end[node] - 3))


def test_a_shared_token_is_the_likelier_sources_and_the_rest_are_their_own():
    candidates = merged([chains_of((0, [5, 6, 7], 0.4, LOOKUP)), chains_of((0, [5, 8], 0.9, NGRAM))])
    tree = candidates.tree
    assert {drafted(tree, node): tree.source[node] for node in range(2, len(tree))} == {
        (5,): NGRAM,
        (5, 6): LOOKUP,
        (5, 6, 7): LOOKUP,
        (5, 8): NGRAM,
    }


def test_the_head_weighs_all_children_of_a_node():
    """It proposes one of two, beside a third; what a grammar forces it does not change."""
    chains = [chains_of((0, [5, 6], 0.5, LOOKUP), (1, [4, 4], 0.97, GRAMMAR)), chains_of((0, [7, 8], 0.4, NGRAM))]
    candidates, before = merged(chains), merged(chains)
    candidates.add(np.array([0, 1]), np.log([[0.6, 0.2], [0.9, 0.05]]), np.array([[7, 9], [4, 3]]), 2)
    tree = candidates.tree
    found = {(int(tree.request[n]), *drafted(tree, n)): n for n in range(2, len(tree))}
    rises = lambda path: tree.score[found[path]] - before.tree.score[found[path]]  # noqa: E731
    assert rises((0, 7)) == rises((0, 7, 8)) > 0 > rises((0, 5)) == rises((0, 5, 6))
    assert rises((1, 4)) == rises((1, 4, 4)) == 0
    assert tree.source[found[0, 7]] == BOTH
    assert tree.source[found[1, 4]] == GRAMMAR
    assert found.keys() == {(0, 5), (0, 5, 6), (0, 7), (0, 7, 8), (0, 9), (1, 4), (1, 4, 4), (1, 3)}


def test_of_one_path_the_chain_of_most_expected_tokens_is_left():
    rows = (0, [5], 0.9, LOOKUP), (0, [6] * 9, 0.8, NGRAM)
    for proposed in ([chains_of(*rows)], [chains_of(row) for row in rows]):
        assert merged(proposed, one_path=True).tree.token[2:].tolist() == [6] * 9


@pytest.mark.parametrize("length", [16, 64])
def test_a_long_chain_is_verified_where_it_costs_nothing(length):
    """It is longer than a draft may be deep; what the request still needs, and has room for, bounds it."""
    chain = Copied(chains_of((0, list(range(length)), 0.99, LOOKUP)))
    settings = SHAPE.__class__(max_depth=5, beams=2, width=3, per_request=length + 1)
    acceptance = Acceptance.uncalibrated(5, CALIBRATED_START)
    planner = GoodputPlanner("goodput", settings, Costs(linear(1.0, 0), linear(9, 0)), acceptance, 1, [chain])
    load = load_of(1, max_draft_len=np.array([length]))
    plan = planner.plan(np.array([3]), SeededDraft([1]), load)
    assert len(plan.tree) == 1 + length
    assert plan.checked(np.array([3]), load, length + 1) is plan
