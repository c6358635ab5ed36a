"""Accept: walk down each tree as far as the target agrees. Exact for any deterministic tree, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from echo_trt.decoding.super_tree import SuperTree


def accept(tree: SuperTree, next_token: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``next_token(nodes [m]) -> tokens [m]`` is the target's own next token at a node: its argmax, or its draw.

    Where a child carries that token the walk goes on from the child; else the token is emitted and the walk stops. So
    every visited node emits one token, and the emitted text is what the target alone would have written.
    Returns the visited nodes, request by request and root first, and the token that each emits: int64 [m], [m].
    """
    emitted = np.full(len(tree), -1, np.int64)
    visited = np.flatnonzero(tree.parent < 0)
    depth = 0
    while len(visited):
        emitted[visited] = next_token(visited)
        depth += 1
        level = np.flatnonzero(tree.depth == depth)
        visited = level[tree.token[level] == emitted[tree.parent[level]]]
    path = np.flatnonzero(emitted >= 0)
    path = path[np.lexsort((tree.depth[path], tree.request[path]))]
    return path, emitted[path]
