"""Random super-trees for hypothesis, and the plain per-node walk that the array code is measured against."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from echo_trt.speculation.super_tree import SuperTree


@st.composite
def super_trees(draw: st.DrawFn, max_requests: int = 4, max_nodes: int = 20) -> SuperTree:
    """Ragged trees whose nodes come in any order that puts parents first. Siblings carry the tokens 0, 1, 2, ...

    Scores are sums of eighths, so that they are exact, and of few values, so that they tie.
    """
    requests = draw(st.integers(1, max_requests))
    tree = SuperTree.from_roots(np.arange(requests))
    for index, fall in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 4)), max_size=max_nodes)):
        parent = index % len(tree)
        siblings = int((tree.parent == parent).sum())
        tree.add(np.array([parent]), np.array([siblings]), tree.score[[parent]] - fall / 8)
    return tree


def path_to(tree: SuperTree, node: int) -> list[int]:
    """Return the nodes from the top down to ``node``."""
    above = int(tree.parent[node])
    return [*(path_to(tree, above) if above >= 0 else []), int(node)]


def nodes_of(tree: SuperTree, request: int) -> list[int]:
    return [node for node in range(len(tree)) if tree.request[node] == request]
