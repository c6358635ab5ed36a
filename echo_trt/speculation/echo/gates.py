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
