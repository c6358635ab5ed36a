"""Sparse confidence gates: at a few depths per request must be confident enough to be drafted further."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

OPEN = -1.0  # a threshold that every confidence passes


def passes(gates: Mapping[int, float], depth: int, confidence: np.ndarray) -> np.ndarray:
    """Tell which requests may go deeper than ``depth``: bool [A].

    gates       depth d -> threshold tau_d; other depths have no gate
    confidence  float [A], conf(i, d) = exp(max_j S(i, d, j)), the best path probability of a request's level d
    """
    return confidence > gates.get(depth, OPEN)


def fixed(gates: Mapping[int, float], threshold: float) -> dict[int, float]:
    """Replace the thresholds by a common one: the paper's ablation "fixed"."""
    return dict.fromkeys(gates, threshold)


def dense(gates: Mapping[int, float], max_depth: int) -> dict[int, float]:
    """Give every depth a gate, on straight lines between the sparse ones: the paper's ablation "dense"."""
    known = sorted(gates)
    depths = range(1, max_depth + 1)
    return dict(zip(depths, np.interp(depths, known, [gates[d] for d in known]).tolist(), strict=True)) if known else {}
