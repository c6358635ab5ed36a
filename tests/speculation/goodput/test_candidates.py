"""The head's drafts and copied text in one tree, against a retelling that keeps a dictionary of paths per request."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from forests import nodes_of
from hypothesis import given
from hypothesis import strategies as st
from machines import copied_chains, random_acceptance
from seeded_draft import SeededDraft, drafted

from echo_trt.speculation.chains import Chains
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED_START, Acceptance
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.sources import BOTH, DRAFT, LOOKUP, NGRAM
from echo_trt.speculation.super_tree import SuperTree

LENGTH = 5  # of copied continuations
Path = tuple[int, ...]


@dataclass
class Node:
    score: float
    source: int
    probability: float


@dataclass
class Retold:
    """One request: what is known of each path, which of them are the copied chain, which were expanded."""

    acceptance: Acceptance
    max_draft_len: int
    log_a: float
    copied: list[int]
    nodes: dict[Path, Node] = field(default_factory=lambda: {(): Node(0.0, DRAFT, 1.0)})
    expanded: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.chain = [tuple(self.copied[: n + 1]) for n in range(min(len(self.copied), self.max_draft_len))]
        for path in self.chain:
            self.nodes[path] = Node(len(path) * self.log_a, LOOKUP, 0.0)
        self.appraise_chain()

    def own(self, path: Path) -> float:
        node = self.nodes[path]
        arrays = np.array([node.source]), np.array([len(path)]), np.array([node.score])
        return float(self.acceptance.probability(*arrays)[0])

    def appraise_chain(self) -> None:
        minimum = 1.0
        for path in self.chain:
            minimum = self.nodes[path].probability = min(minimum, self.own(path))

    def expand(self, path: Path, log_q: np.ndarray, tokens: np.ndarray, width: int) -> None:
        self.expanded.add(path)
        if len(path) >= self.max_draft_len:
            return
        proposed = [(*path, token) for token in tokens.tolist()[:width]]
        exists = [each > -np.inf for each in log_q.tolist()[:width]]
        kept = {child for child, there in zip(proposed, exists, strict=True) if there}
        chain_child = self.chain[len(path)] if len(self.chain) > len(path) else None
        if chain_child and chain_child[:-1] == path and chain_child not in kept:
            left = max(1 - np.exp(np.minimum(log_q[:width], 0)).sum(), 0.02)
            a = np.exp(self.log_a)
            for below in self.chain[len(path) :]:
                self.nodes[below].score += np.log(left / (a * left + 1 - a))
            self.appraise_chain()
        for each, token in list(zip(np.minimum(log_q, 0).tolist(), tokens.tolist(), strict=True))[:width]:
            child = (*path, token)
            if each == -np.inf:
                continue
            if child in self.chain:
                q, a = np.exp(each), np.exp(self.log_a)
                rise = np.log(1 - (1 - q) * (1 - a)) - self.log_a
                self.nodes[child].source = BOTH
                for below in self.chain[len(path) :]:
                    self.nodes[below].score += rise
                self.appraise_chain()
            else:
                self.nodes[child] = node = Node(self.nodes[path].score + each, DRAFT, 0.0)
                node.probability = min(self.own(child), self.nodes[path].probability)

    def may_be_expanded(self, depth: int) -> set[Path]:
        return {p for p in self.nodes if len(p) == depth < self.max_draft_len and p[:-1] in self.expanded}


def copied_of(draft: SeededDraft, request: int, picks: list[int]) -> list[int]:
    """Return a text of which some tokens are the draft's own children, of whatever rank, and the others are not."""
    path: Path = ()
    for pick in picks:
        tokens = draft.children(request, path)[1]
        path = (*path, int(tokens[pick]) if pick < len(tokens) else pick)
    return list(path)


@st.composite
def cases(draw) -> tuple[SeededDraft, Acceptance, list[int], list[list[int]], list[float]]:
    seeds = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True))
    draft = SeededDraft(seeds, spread=draw(st.sampled_from([0.05, 0.3])), missing=draw(st.sampled_from([0.0, 0.3])))
    acceptance = random_acceptance(draw(st.integers(0, 99)))
    acceptance.bias[:NGRAM] += np.array(draw(st.tuples(*[st.sampled_from([-1.0, 0.0, 0.5])] * 3)))[:, None]
    max_draft_len = [draw(st.integers(0, 6)) for _ in seeds]
    picks = st.lists(st.sampled_from([0, 0, 1, 3, 11]), max_size=LENGTH)
    copied = [copied_of(draft, request, draw(picks)) for request in range(len(seeds))]
    log_a = np.log(draw(st.lists(st.floats(0.05, 0.95), min_size=len(seeds), max_size=len(seeds)))).tolist()
    return draft, acceptance, max_draft_len, copied, log_a


def chains_of(copied: list[list[int]], log_a: list[float]) -> Chains:
    """Chains below roots, of which some copy nothing."""
    tokens = np.full((len(copied), LENGTH), -1)
    for row, chain in zip(tokens, copied, strict=True):
        row[: len(chain)] = chain
    return copied_chains(tokens, np.array(log_a))


def assert_same(candidates: Candidates, retold: list[Retold]) -> None:
    tree = candidates.tree
    for request, want in enumerate(retold):
        nodes = nodes_of(tree, request)
        got = {drafted(tree, node): node for node in nodes}
        assert len(got) == len(nodes)  # no two siblings with the same token
        assert got.keys() == want.nodes.keys()
        for path, node in got.items():
            assert tree.depth[node] == len(path) <= max(want.max_draft_len, 0)
            assert tree.source[node] == want.nodes[path].source
            assert tree.score[node] == pytest.approx(want.nodes[path].score, abs=1e-4)
            assert candidates.probability[node] == pytest.approx(want.nodes[path].probability, abs=1e-3)
    drafted_nodes = np.flatnonzero(tree.parent >= 0)
    above = tree.parent[drafted_nodes]
    assert (above < drafted_nodes).all()
    assert (candidates.probability[drafted_nodes] <= candidates.probability[above]).all()
    assert (candidates.value[drafted_nodes] <= candidates.value[above]).all()
    assert (candidates.probability[: tree.num_requests] == 1).all()


def assert_best(candidates: Candidates, frontier: np.ndarray, retold: list[Retold], depth: int, beams: int) -> None:
    """``frontier`` are each request's best of those that may be expanded, best first."""
    tree, value = candidates.tree, candidates.value
    assert (np.diff(value[frontier]) <= 0).all()
    for request, want in enumerate(retold):
        chosen = {drafted(tree, node) for node in frontier if tree.request[node] == request}
        allowed = want.may_be_expanded(depth)
        assert chosen <= allowed
        assert len(chosen) == min(beams, len(allowed))
        worth = {drafted(tree, node): value[node] for node in nodes_of(tree, request)}
        assert sorted(worth[p] for p in chosen) == sorted(worth[p] for p in allowed)[len(allowed) - len(chosen) :]


@given(cases(), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.randoms(use_true_random=False))
def test_candidates_are_what_they_promise(case, beams, width, copying, random):
    draft, acceptance, max_draft_len, copied, log_a = case
    count = len(max_draft_len)
    copied = copied if copying else [[]] * count
    weights = np.array([random.uniform(0.8, 1.25) for _ in max_draft_len])
    retold = [Retold(acceptance, r, a, c) for r, a, c in zip(max_draft_len, log_a, copied, strict=True)]
    candidates = Candidates(
        SuperTree.from_roots(np.arange(count)),
        acceptance,
        weights,
        np.array(max_draft_len),
        [chains_of(copied, log_a)] if copying else [],
    )
    assert_same(candidates, retold)
    for depth in range(5):
        if depth == 0:
            chosen = np.array(sorted(random.sample(range(count), random.randint(1, count))))
        else:
            frontier = candidates.frontier(depth, beams)
            assert_best(candidates, frontier, retold, depth, beams)
            chosen = np.sort(frontier[: random.randint(0, len(frontier))])
        if len(chosen) == 0:
            break
        tree = candidates.tree
        for node in chosen:
            path, request = drafted(tree, node), int(tree.request[node])
            retold[request].expand(path, *draft.children(request, path), width)
        children = draft.expand_roots(chosen) if depth == 0 else draft.expand(tree, chosen)
        candidates.add(chosen, *children, width)
        assert_same(candidates, retold)
        assert candidates.value == pytest.approx(candidates.probability * weights[candidates.tree.request])


@given(cases(), st.randoms(use_true_random=False))
def test_one_path_keeps_the_likelier_of_two_children_and_nothing_below_the_other(case, random):
    draft, acceptance, max_draft_len, copied, log_a = case
    count, both = len(max_draft_len), []
    for one_path in (False, True):
        copies = chains_of(copied, log_a)
        tree = SuperTree.from_roots(np.arange(count))
        both.append(Candidates(tree, acceptance, np.ones(count), np.array(max_draft_len), [copies], one_path))
    free, kept = both
    chosen = np.array(sorted(random.sample(range(count), random.randint(1, count))))
    for depth in range(6):
        if depth:
            chosen = np.sort(kept.frontier(depth, 1))
        if len(chosen) == 0:
            break
        for candidates in both:  # the same nodes are expanded in both
            children = draft.expand(candidates.tree, chosen) if depth else draft.expand_roots(chosen)
            candidates.add(chosen, *children, 1)
        tree, alive = kept.tree, kept.probability > 0
        nodes = np.flatnonzero(tree.parent >= 0)
        assert alive[tree.parent[nodes]][alive[nodes]].all()
        assert np.bincount(tree.parent[nodes[alive[nodes]]], minlength=1).max() <= 1
        assert (kept.probability[alive] == free.probability[alive]).all()
        for node in nodes[~alive[nodes]]:  # each lost to another child of a node above it, or the one above it did
            above = tree.parent[node]
            rivals = nodes[(tree.parent[nodes] == above) & alive[nodes]]
            assert not alive[above] or (free.probability[rivals] >= free.probability[node]).any()


def one_chain(max_draft_len: int = 9, chain: tuple[int, ...] = (7, 8, 9), a: float = 0.5) -> Candidates:
    """One request, taken at its word, whose text suggests ``chain``."""
    copied = chains_of([list(chain)], [float(np.log(a))])
    tree = SuperTree.from_roots(np.array([1]))
    acceptance = Acceptance.uncalibrated(4, CALIBRATED_START)
    return Candidates(tree, acceptance, np.ones(1), np.array([max_draft_len]), [copied])


def test_chains_end_with_the_room_and_where_the_text_ends():
    assert [len(one_chain(max_draft_len).tree) for max_draft_len in (0, 1, 2, 9)] == [1, 2, 3, 4]
    copied = copied_chains(np.array([[5, -1, 6], [-1, 5, 6]]), np.log([0.5, 0.5]))
    tree = SuperTree.from_roots(np.array([1, 2]))
    candidates = Candidates(tree, Acceptance.uncalibrated(4, CALIBRATED_START), np.ones(2), np.array([9, 9]), [copied])
    assert candidates.tree.token.tolist() == [1, 2, 5]
    candidates.add(np.array([0, 1]), np.log([[0.6], [0.5]]), np.array([[5], [5]]), 1)
    assert candidates.tree.source.tolist() == [DRAFT, DRAFT, BOTH, DRAFT]


def test_probabilities_rounded_above_one_and_children_that_do_not_exist():
    candidates = one_chain(chain=())
    candidates.add(np.array([0]), np.array([[0.01, -np.inf]]), np.array([[3, 4]]), 2)
    assert candidates.tree.token.tolist() == [1, 3]
    assert candidates.tree.score.tolist() == [0, 0]


def test_a_draft_that_has_overflowed_proposes_nothing():
    """One number that is none would otherwise be the best of all candidates, and of all that is learnt from them."""
    candidates = one_chain()
    known = len(candidates.tree)
    candidates.add(np.array([0]), np.array([[np.nan, np.log(0.25), np.nan]]), np.array([[3, 4, 5]]), 3)
    assert candidates.tree.token[known:].tolist() == [4]
    assert np.isfinite(candidates.value).all()
