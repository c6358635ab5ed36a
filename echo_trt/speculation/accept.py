"""Accept: walk down each tree as far as the target agrees. The same for greedy and for seeded sampled texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from echo_trt.speculation.super_tree import SuperTree


def accept(tree: SuperTree, next_token: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the visited nodes int64 [m], request by request and root first, and the emitted tokens int64 [m].

    ``next_token(nodes [m]) -> tokens [m]`` is the target's next token at a node: its argmax, or its draw. Where a child
    carries that token the walk goes on from the child; else the token is emitted and the walk stops. So every visited
    node emits one token, and the emitted text is what the target alone would have written.
    """
    emitted = np.full(len(tree), -1, np.int64)
    visited, depth = (tree.parent < 0).nonzero()[0], 0
    while len(visited):
        emitted[visited] = next_token(visited)
        depth += 1
        # A root's parent -1 reads the last element, but no root has this depth.
        visited = ((tree.depth == depth) & (tree.token == emitted[tree.parent])).nonzero()[0]
    path = (emitted >= 0).nonzero()[0]
    path = path[tree.request[path].argsort(kind="stable")]  # a parent always stands before its children
    return path, emitted[path]
