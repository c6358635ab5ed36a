"""Accept: walk down each tree as far as the target agrees. Exact for any deterministic tree, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.super_tree import SuperTree


def accept(tree: SuperTree, next_token: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``next_token(nodes [m]) -> tokens [m]`` is the target's own next token at a node: its argmax, or its draw.

    Where a child carries that token the walk goes on from the child; else the token is emitted and the walk stops. So
    every visited node emits one token, and the emitted text is what the target alone would have written.
    Returns the visited nodes, request by request and root first, and the token that each emits: int64 [m], [m].
    """
    emitted = np.full(len(tree), -1, np.int64)
    visited, depth = (tree.parent < 0).nonzero()[0], 0
    while len(visited):
        emitted[visited] = next_token(visited)
        depth += 1
        visited = _agreeing(tree.parent, tree.depth, tree.token, emitted, depth)
    path = (emitted >= 0).nonzero()[0]
    path = path[tree.request[path].argsort(kind="stable")]  # a parent always stands before its children
    return path, emitted[path]


@compiled("i8[::1](i8[::1], i8[::1], i8[::1], i8[::1], i8)")
def _agreeing(parent: np.ndarray, depth: np.ndarray, token: np.ndarray, emitted: np.ndarray, level: int) -> np.ndarray:
    """The nodes of depth ``level`` that carry what their parents have ``emitted``, -1 where that is nothing."""
    nodes, number = np.empty(len(parent), np.int64), 0
    for node in range(len(parent)):
        if depth[node] == level and token[node] == emitted[parent[node]]:
            nodes[number] = node
            number += 1
    return nodes[:number]
