"""Which candidates to verify: the best nodes of the whole batch, as long as they pay."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.super_tree import SuperTree


def paying_nodes(value: np.ndarray, seconds: np.ndarray, time_price: float) -> int:
    """Return how many of the best nodes pay for their verification.

    A node beyond this number will not pay later either, if the cost per node grows: further candidates only rank before
    it.

    value float64 [n], in tokens. seconds, price: as of ``select``
    """
    best = np.sort(value)[::-1][: len(seconds) - 1]
    return int((np.append(0.0, np.cumsum(best)) - time_price * seconds[: len(best) + 1]).argmax())


def select(value: np.ndarray, tree: SuperTree, per_request: int, seconds: np.ndarray, time_price: float) -> np.ndarray:
    """Choose the nodes to verify, roots among them: the best number of the best nodes, int64, ascending.

    value float64 [n] only falls along a path, so that the best k are ancestor-closed for every k. seconds float64
    [n - B + 1]: the target's pass with 0, 1, ... nodes more than roots, at least as far as they can pay; jagged, so
    every k is tried. price: the tokens that a second is worth.
    """
    roots = tree.num_requests
    nodes = roots + np.flatnonzero(value[roots:] > 0)
    # A child may be worth exactly what its parent is, and comes after.
    order = 1e-12 * tree.depth[nodes] - value[nodes]
    # Verifying more nodes than this costs more than all nodes are worth. In a large batch these are few, and the rest
    # need no sorting.
    maximum = np.flatnonzero(time_price * (seconds - seconds[0]) <= value[nodes].sum())[-1]
    if maximum < len(nodes):
        best = np.flatnonzero(order <= np.partition(order, maximum)[maximum])
        if np.bincount(tree.request[nodes[best]], minlength=1).max() < per_request:
            nodes, order = nodes[best], order[best]
    nodes = tree.best_first(nodes, -order, np.full(roots, per_request - 1))[: len(seconds) - 1]
    worth = np.append(0.0, np.cumsum(value[nodes])) - time_price * seconds[: len(nodes) + 1]
    return np.concatenate((np.arange(roots), np.sort(nodes[: worth.argmax()])))
