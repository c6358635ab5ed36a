"""One source's P(accept), learnt from the nodes that were verified lately: logistic regression over a window."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.goodput.model.acceptance import DEPTHS


class AcceptanceFit:
    """log-odds of P(accept) = slope * x + bias[depth], by a Gaussian prior around the start and a window of nodes.

    Newton's steps on the penalised likelihood (iteratively reweighted least squares). A source that fails loses its
    P(accept) and is verified no more; then its window is forgotten by halves, so that it is tried again, rarely.

    slope  float
    bias   float64 [DEPTHS]
    """

    def __init__(self, slope: float, bias: float, window: int, fixed: bool = False):
        """``window``: nodes that it knows. ``fixed``: the slope and the biases' differences stay as they are."""
        spread = np.array([0.2, 1.0, *[0.3] * DEPTHS])  # standard deviations of the prior
        if fixed:
            spread[[0, *range(2, 2 + DEPTHS)]] = 1e-3
        self._start = np.array([slope, bias, *[0.0] * DEPTHS])  # slope, common bias, and each depth's own
        self._precision = spread**-2
        self._now = self._start.copy()
        self._window, self._new, self._rest = window, 0, 0
        self._columns = np.zeros((0, 2 + DEPTHS))  # x, 1, and the depth's 1, of verified nodes, the oldest first
        self._accepted = np.zeros(0)

    @property
    def slope(self) -> float:
        return float(self._now[0])

    @property
    def bias(self) -> np.ndarray:
        bias: np.ndarray = self._now[1] + self._now[2:]
        return bias

    def observe(self, x: np.ndarray, depth: np.ndarray, accepted: np.ndarray) -> bool:
        """Learn from an iteration's nodes: log-odds ``x`` float64 [n], ``depth`` int64 [n] from 0 on, and outcomes.

        Returns whether the parameters changed.
        """
        if len(x) == 0:
            return self._forget()
        self._rest = 0
        columns = np.zeros((len(x), 2 + DEPTHS))
        columns[:, 0], columns[:, 1] = x, 1.0
        columns[np.arange(len(x)), 2 + depth] = 1.0
        self._columns = np.concatenate((self._columns, columns))[-self._window :]
        self._accepted = np.concatenate((self._accepted, accepted))[-self._window :]
        self._new += len(x)
        if self._new < min(self._window // 16, len(self._accepted) // 4):
            return False
        self._new = 0
        self._refit()
        return True

    def _forget(self) -> bool:
        """Forget the older half of the window, where the source rested for twice its length."""
        self._rest += len(self._accepted) > 0
        if self._rest < 2 * self._window:
            return False
        half = (len(self._accepted) + 1) // 2
        self._columns, self._accepted, self._rest = self._columns[half:], self._accepted[half:], 0
        self._refit()
        return True

    def _refit(self) -> None:
        columns, accepted = self._columns, self._accepted
        for _ in range(2):
            p = 1 / (1 + np.exp(-columns @ self._now))
            gradient = (accepted - p) @ columns - self._precision * (self._now - self._start)
            curvature = (columns.T * (p * (1 - p))) @ columns + np.diag(self._precision)
            # A step of a fit of few nodes could swing.
            self._now = self._now + np.clip(np.linalg.solve(curvature, gradient), -1.0, 1.0)
            self._now[0] = np.clip(self._now[0], 0.2, 2.0)
