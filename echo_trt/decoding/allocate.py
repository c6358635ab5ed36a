"""Allocate: which candidates are verified, under one budget for the whole batch."""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.policies import Policy
from echo_trt.decoding.ragged import rank_within
from echo_trt.decoding.super_tree import SuperTree


def allocate(tree: SuperTree, reach: np.ndarray, policy: Policy) -> np.ndarray:
    """The nodes to verify, an ancestor-closed set that holds every root: indices, ascending.

    Depth first: each request's best path down to its ``reach`` [B]. Then width: whatever the budget still holds goes to
    the best-scored candidates anywhere, at low load a wide fan under each unsure node, at high load nothing.
    One rule for both; there is no mode switch.
    """
    if policy.budget is None:
        return np.flatnonzero(rank_within(tree.request, tree.score) < policy.per_request)
    taken = tree.ancestors_and_self(_path_ends(tree, reach))
    taken[: tree.num_requests] = True
    left = policy.budget - int(taken.sum())
    if left > 0:
        # Scores only fall along a path and a parent stands before its child, so a prefix of this order is closed.
        others = _within_request_limit(tree, taken, np.flatnonzero(~taken), policy.per_request)
        taken[others[np.argsort(-tree.score[others], kind="stable")[:left]]] = True
    return np.flatnonzero(taken)


def _within_request_limit(tree: SuperTree, taken: np.ndarray, others: np.ndarray, limit: int) -> np.ndarray:
    """Of the nodes not yet taken, those that their request may still have: its best, up to ``limit`` nodes in all."""
    if limit >= len(tree):
        return others
    owner = tree.request[others]
    claimed = np.bincount(tree.request[taken], minlength=tree.num_requests)
    return others[rank_within(owner, tree.score[others]) < (limit - claimed)[owner]]


def _path_ends(tree: SuperTree, reach: np.ndarray) -> np.ndarray:
    """Each request's best node at its reach; the root where that is 0."""
    ends = np.flatnonzero(tree.depth == reach[tree.request])
    return ends[rank_within(tree.request[ends], tree.score[ends]) == 0]
