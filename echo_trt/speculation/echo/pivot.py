"""Allocate: which candidates are verified, under one budget for the whole batch."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.super_tree import SuperTree


def allocate(tree: SuperTree, claimed_node: np.ndarray, settings: EchoSettings) -> np.ndarray:
    """Return the nodes to verify, an ancestor-closed set that holds every root: int64, ascending.

    claimed_node int64 [B]: the deepest node that a request has a claim to, its root at least.

    Depth comes first: the paths down to the claimed nodes. While budget is left, it buys width: the best-scored other
    candidates of the whole batch, also of requests that a gate stopped. At high load nothing is left. That is the
    paper's pivot between depth and width; there is no mode switch.

    A node never ranks before its parent: scores only fall along a path, and the earlier of two equal nodes comes first.
    """
    if settings.budget is None:
        limit = np.full(tree.num_requests, settings.per_request)
        return np.sort(tree.best_first(np.arange(len(tree)), tree.score, limit))
    taken = tree.ancestors_and_self(claimed_node)
    left = settings.budget - int(taken.sum())
    if left > 0:
        limit = settings.per_request - np.bincount(tree.request[taken], minlength=tree.num_requests)
        others = np.flatnonzero(~taken)
        taken[tree.best_first(others, tree.score[others], limit)[:left]] = True
    return np.flatnonzero(taken)
