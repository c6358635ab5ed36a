"""One source's P(accept), learnt from the nodes that were verified lately: logistic regression over a window."""

from __future__ import annotations

import numpy as np

DEPTHS = 8  # that have a bias of their own; deeper nodes share the last one
WINDOW = 1024  # verified nodes that a fit knows; larger: steadier, and later where texts change
EVERY = 64  # new nodes between two fits; larger: cheaper, and later
RESTS = 2048  # verifications without one of the source's nodes, after which half of the window is forgotten
_STEPS = 2  # of Newton's method, from the last fit on
_SLOPE, _BIAS, _DEPTH = 0.2, 1.0, 0.3  # standard deviations, before anything was seen; larger: learns sooner, and noise
_LONGEST_STEP = 1.0  # of a parameter; larger: a fit of few nodes may swing
_SLOPES = 0.2, 2.0  # bounds


class Fit:
    """log-odds of P(accept) = slope * x + bias[depth], by a Gaussian prior around the start and a window of nodes.

    Newton's steps on the penalised likelihood (iteratively reweighted least squares). A source that fails loses its
    P(accept) and is verified no more; then its window is forgotten by halves, so that it is tried again, rarely.

    slope  float
    bias   float64 [DEPTHS]
    """

    def __init__(self, slope: float, bias: float, fixed: bool = False):
        """``fixed``: the slope and the biases' differences stay as they are."""
        spread = np.array([_SLOPE, _BIAS, *[_DEPTH] * DEPTHS])
        if fixed:
            spread[[0, *range(2, 2 + DEPTHS)]] = 1e-3
        self._start = np.array([slope, bias, *[0.0] * DEPTHS])  # slope, common bias, and each depth's own
        self._precision = spread**-2
        self._now = self._start.copy()
        self._columns = np.zeros((WINDOW, 2 + DEPTHS))  # x, 1, and the depth's 1, of verified nodes
        self._accepted = np.zeros(WINDOW)
        self._next = self._known = self._new = self._rest = 0
        self._adopt()

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
        self._take(columns[-WINDOW:], accepted[-WINDOW:])
        self._new += len(x)
        if self._new < min(EVERY, self._known // 4):
            return False
        self._new = 0
        self._refit()
        return True

    def _take(self, columns: np.ndarray, accepted: np.ndarray) -> None:
        place = (self._next + np.arange(len(columns))) % WINDOW
        self._columns[place], self._accepted[place] = columns, accepted
        self._next = (self._next + len(columns)) % WINDOW
        self._known = min(self._known + len(columns), WINDOW)

    def _forget(self) -> bool:
        """Forget the older half of the window, where the source rested for long."""
        self._rest += self._known > 0
        if self._rest < RESTS:
            return False
        latest = (self._next - 1 - np.arange(self._known // 2)[::-1]) % WINDOW
        columns, accepted = self._columns[latest], self._accepted[latest]
        self._next = self._known = self._rest = 0
        self._take(columns, accepted)
        self._refit()
        return True

    def _refit(self) -> None:
        columns, accepted = self._columns[: self._known], self._accepted[: self._known]
        for _ in range(_STEPS):
            p = 1 / (1 + np.exp(-columns @ self._now))
            gradient = (accepted - p) @ columns - self._precision * (self._now - self._start)
            curvature = (columns.T * (p * (1 - p))) @ columns + np.diag(self._precision)
            self._now = self._now + np.clip(np.linalg.solve(curvature, gradient), -_LONGEST_STEP, _LONGEST_STEP)
            self._now[0] = np.clip(self._now[0], *_SLOPES)
        self._adopt()

    def _adopt(self) -> None:
        self.slope: float = float(self._now[0])
        self.bias: np.ndarray = self._now[1] + self._now[2:]
