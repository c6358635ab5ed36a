"""Allocate: which candidates are verified, under one budget for the whole batch."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.arrays import rank_within
from echo_trt.decoding.echo.settings import EchoSettings
from echo_trt.decoding.super_tree import SuperTree


def allocate(tree: SuperTree, reach: np.ndarray, settings: EchoSettings) -> np.ndarray:
    """The nodes to verify, an ancestor-closed set that holds every root: indices, ascending.

    Depth first: each request's path down to its ``reach`` [B]. Then width: whatever the budget still holds goes to
    the best-scored candidates of the whole batch: at low load siblings of the unsure and of the confident alike, at
    high load nothing. That is the paper's pivot between depth and width; there is no mode switch.
    """
    if settings.budget is None:
        everyone = np.full(tree.num_requests, settings.per_request)
        return np.sort(_best_first(tree, np.arange(len(tree)), everyone))
    taken = tree.ancestors_and_self(reach)
    left = settings.budget - int(taken.sum())
    if left > 0:
        claimed = np.bincount(tree.request[taken], minlength=tree.num_requests)
        others = _best_first(tree, np.flatnonzero(~taken), settings.per_request - claimed)
        taken[others[:left]] = True
    return np.flatnonzero(taken)


def _best_first(tree: SuperTree, nodes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """``nodes``, ascending, by falling score; of each request its best, ``most`` [B] at most.

    Scores only fall along a path, and of equals the earlier comes first, so that no node comes before its parent.
    """
    nodes = nodes[np.argsort(-tree.score[nodes], kind="stable")]
    owner = tree.request[nodes]
    best: np.ndarray = nodes[rank_within(owner) < most[owner]]
    return best
