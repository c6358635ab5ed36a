"""Fits the sparse gates: their depths and thresholds."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from echo_trt.bundle.calibration import Gate
from echo_trt_lab.calibration.observe import Observed

GATES = 3  # gates at most, depth 1 included; larger: more depths at which drafts may end


def fit_gates(head: Observed, max_depth: int) -> tuple[list[Gate], float]:
    """Fit a gate for every depth, the sparse ones marked, and the best single threshold for those.

    Confidence is the best path probability of a depth; the label is whether some path of that depth was accepted. A
    depth is worth a gate where confidence predicts the label and the label varies (``worth``).
    """
    by_depth = [_by_tree(head, depth) for depth in range(1, max_depth + 1)]
    confidence, label = [c for c, _ in by_depth], [y for _, y in by_depth]
    aucs = [auc(c, y) for c, y in zip(confidence, label, strict=True)]
    merit = [worth(a, y.mean() if len(y) else 0.0) for a, y in zip(aucs, label, strict=True)]
    gated = [0]  # depths less one
    for depth in np.argsort(merit)[::-1].tolist():
        if len(gated) < GATES and all(abs(depth - other) >= 2 for other in gated):
            gated.append(depth)
    thresholds = [youden(c, y) for c, y in zip(confidence, label, strict=True)]
    pooled = [np.concatenate([part[s] for s in gated]) for part in (confidence, label)]
    gates = [
        Gate(
            depth=d + 1,
            auc=round(aucs[d], 4),
            samples=len(label[d]),
            accepted=round(float(label[d].mean()), 4) if len(label[d]) else 0.0,
            threshold=round(thresholds[d], 3),
            sweet_spot=d in gated,
        )
        for d in range(max_depth)
    ]
    return gates, round(youden(*pooled), 3)


def _by_tree(head: Observed, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best path probability of ``depth`` and whether a node there was accepted, for trees of that depth."""
    at = np.flatnonzero(head.depth == depth)
    if len(at) == 0:
        return np.zeros(0), np.zeros(0, bool)
    starts = np.flatnonzero(np.concatenate(([True], np.diff(head.tree[at]) != 0)))
    return np.exp(np.maximum.reduceat(head.score[at], starts)), np.logical_or.reduceat(head.accepted[at], starts)


def worth(auc: float, accepted: float) -> float:
    """Return what a gate is worth, 0 to 1: it tells accepted drafts from others, and there are both.

    accepted  share of drafts that are accepted at the gate's depth
    """
    return float((2 * auc - 1) * 2 * np.sqrt(accepted * (1 - accepted)))


def auc(confidence: np.ndarray, label: np.ndarray) -> float:
    """Compute P(an accepted tree has more confidence than a rejected one), ties half; 0.5 without both kinds."""
    positive = int(label.sum())
    negative = len(label) - positive
    if positive == 0 or negative == 0:
        return 0.5
    ranks = rankdata(confidence)[label].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def youden(confidence: np.ndarray, label: np.ndarray) -> float:
    """Find the threshold with the largest share of accepted trees kept plus share of rejected trees cut (Youden's J).

    It is 0 where all trees are accepted and 1 where none is.
    """
    positive = int(label.sum())
    if positive == len(label):
        return 0.0
    if positive == 0:
        return 1.0
    order = np.argsort(-confidence, kind="stable")
    kept, missed = np.cumsum(label[order]) / positive, np.cumsum(~label[order]) / (len(label) - positive)
    ranked = confidence[order]
    apart = np.append(ranked[1:] < ranked[:-1], True)  # trees of equal confidence pass a gate together
    # The threshold is half-way to the next confidence, since a gate passes only greater ones.
    last = int(np.where(apart, kept - missed, -np.inf).argmax())
    return float(ranked[last] + ranked[min(last + 1, len(ranked) - 1)]) / 2
