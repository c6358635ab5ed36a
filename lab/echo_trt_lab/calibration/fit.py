"""Fits a calibration to recorded trees: gates by depth, P(accept | score, depth), and the worth of children."""

from __future__ import annotations

import numpy as np
from scipy.optimize import isotonic_regression

from echo_trt.bundle.calibration import Calibration
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED, Acceptance, knots
from echo_trt_lab.calibration.gates import fit_gates
from echo_trt_lab.calibration.observe import Observed, observe
from echo_trt_lab.calibration.trees import Trees

QUANTILES = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
CHILDREN = 2  # children of a node whose worth is stored; larger: a deeper estimate, a larger file
PRIOR = 10  # pseudo-observations of a probability; larger: a few data weigh less against the fallback


def fit(trees: Trees, target_sha256: str, draft_sha256: str, max_depth: int, beams: int, width: int) -> Calibration:
    """Fit a calibration to all of ``trees``; fewer than a few hundred positions say nothing."""
    lookup = lookup_acceptance(trees)
    observed = observe(trees, lookup, max_depth, beams, width)
    head = observe(trees, None, max_depth, beams, width)
    table = acceptance_table(observed, max_depth)
    gates, fixed = fit_gates(head, max_depth)
    return Calibration(
        target_sha256=target_sha256,
        draft_sha256=draft_sha256,
        positions=len(trees),
        gates=gates,
        fixed_threshold=fixed,
        acceptance={name: np.round(rows, 5).tolist() for name, rows in zip(CALIBRATED, table, strict=True)},
        children=np.round(children_quantiles(observed, table, max_depth, beams), 4).tolist(),
        lookup=lookup,
    )


def lookup_acceptance(trees: Trees, longest: int = 4) -> list[float]:
    """Estimate P(the first copied token is accepted) after a match of 1, 2, ... ``longest`` or more tokens."""
    right = trees.copied[:, 0] == trees.truth(np.arange(len(trees)), np.ones(len(trees), np.int64))
    judged = (trees.copied[:, 0] >= 0) & (trees.left >= 1)
    matched = np.minimum(trees.matched, longest)
    counts = [(judged & (matched == m), 0.2 * m) for m in range(1, longest + 1)]
    shares = [(right[at].sum() + PRIOR * prior) / (at.sum() + PRIOR) for at, prior in counts]
    return np.clip(np.maximum.accumulate(shares), 0.01, 0.99).round(4).tolist()


def acceptance_table(observed: Observed, max_depth: int) -> np.ndarray:
    """Fit P(accepted | score) at the knots by isotonic regression: float64 [sources, max_depth, KNOTS].

    A cell with little data borrows from the head's table, which starts from the draft's path probability.
    """
    at = knots()
    table = np.empty((len(CALIBRATED), max_depth, len(at)))
    for source in range(len(CALIBRATED)):
        for depth in range(max_depth):
            here = (observed.source == source) & (observed.depth == depth + 1)
            fallback = at if source == 0 else table[0, depth]
            table[source, depth] = _isotonic(np.exp(observed.score[here]), observed.accepted[here], at, fallback)
    return np.clip(table, 1e-4, 0.999)


def _isotonic(x: np.ndarray, accepted: np.ndarray, at: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    # Observations are counted at their nearest knot; PRIOR pseudo-observations, spread over all knots, fill empty ones.
    cell = np.abs(np.sqrt(x) * (len(at) - 1)).round().astype(np.int64)
    count = np.bincount(cell, minlength=len(at)) + PRIOR / len(at)
    share = (np.bincount(cell, accepted, minlength=len(at)) + PRIOR / len(at) * fallback) / count
    return isotonic_regression(share, weights=count).x


def children_quantiles(observed: Observed, table: np.ndarray, max_depth: int, beams: int) -> np.ndarray:
    """Compute how much the best and the second child of a node are worth, as a share of the node's worth.

    Returns QUANTILES, float64 [max_depth, CHILDREN, 5]. Nodes count by their worth, since likely nodes are expanded.
    """
    acceptance = Acceptance(table, np.zeros((max_depth, CHILDREN, len(QUANTILES))))
    worth = acceptance.probability(observed.source, observed.depth, observed.score)
    quantiles = np.zeros((max_depth, CHILDREN, len(QUANTILES)))
    for depth in range(max_depth):
        child = np.flatnonzero((observed.depth == depth + 1) & (observed.source != 1))
        parent = observed.parent[child]
        owner, base = (observed.tree[child], np.ones(len(child))) if depth == 0 else (parent, worth[parent])
        share = np.minimum(worth[child] / np.maximum(base, 1e-9), 0.999)
        order = np.lexsort((-share, owner))
        starts = np.concatenate(([True], np.diff(owner[order]) != 0))
        rank = np.arange(len(order)) - np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        for index in range(CHILDREN):
            chosen = order[rank == index]
            if len(chosen):
                quantiles[depth, index] = _weighted_quantiles(share[chosen], base[chosen])
    return quantiles


def _weighted_quantiles(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(values)
    share = (np.cumsum(weights[order]) - 0.5 * weights[order]) / weights.sum()
    return np.interp(QUANTILES, share, values[order])
