"""Acceptance against a plain walk, and its promise: the text is the target's own, whatever was drafted."""

from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import pytest
from forests import nodes_of, super_trees
from hypothesis import given
from hypothesis import strategies as st
from machines import load_of
from seeded_draft import PathDraft, drafted

from echo_trt.speculation.accept import accept
from echo_trt.speculation.planner import Planner
from echo_trt.speculation.policies import make_planner
from echo_trt.speculation.policy_names import PLAIN
from echo_trt.speculation.super_tree import SuperTree


def walk(tree: SuperTree, node: int, says: list[int]) -> list[tuple[int, int]]:
    """Return the visited nodes from ``node`` on, each with what it emits."""
    for child in range(len(tree)):
        if tree.parent[child] == node and tree.token[child] == says[node]:
            return [(node, says[node]), *walk(tree, child, says)]
    return [(node, says[node])]


@given(super_trees(), st.booleans(), st.data())
def test_accept_walks_down_each_tree(tree, by_request, data):
    if by_request:
        tree, _ = tree.sorted_by_request(np.arange(len(tree)))
    says = data.draw(st.lists(st.integers(0, 3), min_size=len(tree), max_size=len(tree)), label="target")
    requested = []

    def next_token(nodes: np.ndarray) -> np.ndarray:
        requested.extend(nodes.tolist())
        return np.array(says)[nodes]

    path, emitted = accept(tree, next_token)
    roots = sorted(np.flatnonzero(tree.parent < 0), key=lambda root: tree.request[root])
    want = [step for root in roots for step in walk(tree, int(root), says)]
    assert list(zip(path.tolist(), emitted.tolist(), strict=True)) == want
    assert sorted(requested) == sorted(path.tolist())  # each visited node once, and no other


def test_an_empty_batch():
    path, emitted = accept(SuperTree.from_roots(np.zeros(0, np.int64)), lambda nodes: nodes)
    assert len(path) == len(emitted) == 0


# -- lossless ------------------------------------------------------------------------------------------------------

VOCAB = 11
SETTINGS = {
    "budget": 14,
    "per_request": 64,
    "max_depth": 5,
    "beams": 2,
    "width": 4,
    "gates": {1: 0.3, 3: 0.15},
    "fixed_threshold": 0.25,
    "static": {"depth": 3, "top_k": 3, "tokens": 7},
}
PLANNERS = {name: make_planner(name, SETTINGS, lambda *_: None) for name in (PLAIN, "static", "dense", "fixed", "echo")}


def hashed(*what: object) -> int:
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=6).digest())


def target(seed: int, text: tuple[int, ...]) -> int:
    """Return what comes after ``text``: a draw that hangs on the seed, the position and every token before."""
    return hashed(seed, len(text), text) % VOCAB


class GuessingDraft(PathDraft):
    """Knows the target, and puts its token first, somewhere, or nowhere among the four children, by chance ``hit``."""

    def __init__(self, seeds: list[int], texts: list[tuple[int, ...]], hit: float):
        super().__init__()
        self.seeds, self.texts, self.hit = seeds, texts, hit

    def children(self, request: int, path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        text = self.texts[request] + path
        truth, chance = target(self.seeds[request], text), hashed("chance", text)
        others = [(truth + 1 + (chance + i) % (VOCAB - 1)) % VOCAB for i in range(5)]
        index = 0 if chance % 1000 < self.hit * 1000 else 1 + chance % 4
        tokens = [*others[:index], truth, *others[index:]][:4]
        best = (0.4, 0.6, 0.9)[chance % 3]
        return np.log(np.float32([best, 0.08, 0.01, 0.005])), np.array(tokens)


def decode(
    seeds: list[int],
    prompts: list[tuple[int, ...]],
    limits: list[int],
    planner_at: Callable[[int], Planner],
    hit: float,
) -> tuple[list[tuple[int, ...]], int]:
    """Speculative decoding of a batch that shrinks as its requests finish: the texts, and verifications in all."""
    texts, iteration, verifications = list(prompts), 0, 0
    while running := [i for i in range(len(texts)) if len(texts[i]) < limits[i]]:
        own_seeds, own_texts = [seeds[i] for i in running], [texts[i] for i in running]
        max_draft_len = np.array([limits[i] - len(texts[i]) - 1 for i in running])
        roots = np.array([text[-1] for text in own_texts])
        load = load_of(len(running), slots=np.array(running), max_draft_len=max_draft_len)
        tree = planner_at(iteration).plan(roots, GuessingDraft(own_seeds, own_texts, hit), load).tree

        def next_token(nodes: np.ndarray, tree=tree, seeds=own_seeds, texts=own_texts) -> np.ndarray:
            owners = tree.request[nodes].tolist()
            return np.array([target(seeds[i], texts[i] + drafted(tree, n)) for i, n in zip(owners, nodes, strict=True)])

        path, emitted = accept(tree, next_token)
        assert set(tree.request[path].tolist()) == set(range(len(running)))  # each advances, every time
        for index, i in enumerate(running):
            texts[i] += tuple(emitted[tree.request[path] == index].tolist())
        iteration, verifications = iteration + 1, verifications + len(running)
    return texts, verifications


def plain(seed: int, prompt: tuple[int, ...], limit: int) -> tuple[int, ...]:
    text = prompt
    while len(text) < limit:
        text += (target(seed, text),)
    return text


def batch_of(size: int) -> tuple[list[int], list[tuple[int, ...]], list[int]]:
    return [100 + i for i in range(size)], [(i % 3, i) for i in range(size)], [20 + 5 * (i % 4) for i in range(size)]


@pytest.mark.parametrize("hit", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("size", range(1, 10))
def test_the_text_is_the_targets_own(size, name, hit):
    seeds, prompts, limits = batch_of(size)
    texts, verifications = decode(seeds, prompts, limits, lambda _: PLANNERS[name], hit)
    assert texts == [plain(*request) for request in zip(seeds, prompts, limits, strict=True)]
    tokens = sum(limits) - 2 * size
    if name == PLAIN:
        assert verifications == tokens
    elif hit > 0.9 and size <= 3:
        assert verifications < tokens / 2  # it did speculate


@given(st.lists(st.sampled_from([*PLANNERS]), min_size=1, max_size=6), st.integers(1, 5), st.sampled_from([0.4, 0.8]))
def test_the_policy_may_change_between_iterations(names, size, hit):
    seeds, prompts, limits = batch_of(size)
    texts, _ = decode(seeds, prompts, limits, lambda iteration: PLANNERS[names[iteration % len(names)]], hit)
    assert texts == [plain(*request) for request in zip(seeds, prompts, limits, strict=True)]


@given(super_trees(max_requests=3), st.integers(0, 99))
def test_any_tree_emits_a_prefix_of_the_plain_text(tree, seed):
    path, emitted = accept(tree, lambda nodes: np.array([target(seed, drafted(tree, n)) % 3 for n in nodes]))
    want: tuple[int, ...] = ()
    while len(want) < 25:
        want += (target(seed, want) % 3,)
    for request in range(tree.num_requests):
        own = emitted[tree.request[path] == request].tolist()
        assert own == list(want[: len(own)])
        assert len(own) <= 1 + tree.depth[nodes_of(tree, request)].max()
