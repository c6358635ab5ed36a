"""Acceptance against a plain walk, and its promise: the text is the target's own, whatever was drafted."""

from hashlib import blake2b

import numpy as np
from forests import nodes_of, super_trees
from hypothesis import given
from hypothesis import strategies as st
from seeded_draft import drafted

from echo_trt.speculation.accept import accept
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


# -- lossless ------------------------------------------------------------------------------------------------------


def target(seed: int, text: tuple[int, ...]) -> int:
    """Draw what comes after ``text`` from the seed, the position and every token before."""
    return int.from_bytes(blake2b(repr((seed, len(text), text)).encode(), digest_size=6).digest()) % 3


@given(super_trees(max_requests=3), st.integers(0, 99))
def test_any_tree_emits_a_prefix_of_the_plain_text(tree, seed):
    path, emitted = accept(tree, lambda nodes: np.array([target(seed, drafted(tree, n)) for n in nodes]))
    want: tuple[int, ...] = ()
    while len(want) < 25:
        want += (target(seed, want),)
    for request in range(tree.num_requests):
        own = emitted[tree.request[path] == request].tolist()
        assert own == list(want[: len(own)])
        assert len(own) <= 1 + tree.depth[nodes_of(tree, request)].max()
