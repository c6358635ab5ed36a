"""P(accept) of each source, corrected by the nodes that were verified lately: logistic regression over a window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from echo_trt.speculation.goodput.model.acceptance import DEPTHS, Acceptance, log_odds
from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.sources import SOURCES

LOADED_STEPS = 5  # refits of two bounded steps; larger: a start takes longer, and parameters far away are reached


def _columns(x: np.ndarray, depth: np.ndarray) -> np.ndarray:
    columns = np.zeros((len(x), 2 + DEPTHS))
    columns[:, 0], columns[:, 1] = x, 1.0
    columns[np.arange(len(x)), 2 + depth] = 1.0
    return columns


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
        self._columns = np.concatenate((self._columns, _columns(x, depth)))[-self._window :]
        self._accepted = np.concatenate((self._accepted, accepted))[-self._window :]
        self._new += len(x)
        if self._new < min(self._window // 16, len(self._accepted) // 4):
            return False
        self._new = 0
        self._refit()
        return True

    def dump(self) -> np.ndarray:
        """Return the nodes that it knows, float64 [n, 3]: log-odds, depth and outcome."""
        return np.column_stack((self._columns[:, 0], self._columns[:, 2:].argmax(axis=1), self._accepted))

    def load(self, nodes: np.ndarray) -> None:
        """Begin with what another fit has dumped."""
        x, depth, self._accepted = nodes[-self._window :].T
        self._columns = _columns(x, depth.astype(np.int64))
        for _ in range(LOADED_STEPS):
            self._refit()

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


class SourceLearner:
    """Keeps ``acceptance`` true by a fit for each source, and sums up what sources bring.

    tried, expected, accepted  float64 [sources]: verified nodes, the sum of their P(accept), and those accepted
    silent                     int64 [sources]: minutes in which a source was tried and hardly anything was accepted
    """

    def __init__(self, acceptance: Acceptance, tuning: GoodputTuning):
        self.acceptance = acceptance
        own = np.arange(len(SOURCES)) >= len(acceptance.table)  # their nodes bring their own probability
        self.fits = [
            AcceptanceFit(float(slope), float(bias), tuning.fit_window, fixed)
            for slope, bias, fixed in zip(acceptance.slope, acceptance.bias[:, 0], own, strict=True)
        ]
        self.tried, self.expected, self.accepted = np.zeros((3, len(SOURCES)))
        self.silent = np.zeros(len(SOURCES), np.int64)
        self._begin_minute()

    def observe(
        self, source: np.ndarray, depth: np.ndarray, score: np.ndarray, probability: np.ndarray, accepted: np.ndarray
    ) -> None:
        """Learn from verified nodes, all [n]: their ``probability`` then, and whether they were ``accepted``."""
        self.tried += np.bincount(source, minlength=len(SOURCES))
        self.expected += np.bincount(source, probability, len(SOURCES))
        self.accepted += np.bincount(source, accepted, len(SOURCES))
        model, row = self.acceptance, np.minimum(depth, DEPTHS) - 1
        own = source >= len(model.table)  # their probability was corrected by this bias already
        prior = np.empty(len(source))
        prior[own] = log_odds(probability[own]) - model.bias[source[own], row[own]]
        prior[~own] = model.prior(source[~own], depth[~own], score[~own])
        for number, fit in enumerate(self.fits):
            of_source = source == number
            if fit.observe(prior[of_source], row[of_source], accepted[of_source]):
                model.slope[number], model.bias[number] = fit.slope, fit.bias

    def dump(self) -> dict[str, np.ndarray]:
        return {source: fit.dump() for source, fit in zip(SOURCES, self.fits, strict=True)}

    def load(self, nodes: Mapping[str, np.ndarray]) -> None:
        """Begin with dumped ``nodes``; a source that another version did not have begins anew."""
        for number, (source, fit) in enumerate(zip(SOURCES, self.fits, strict=True)):
            if source in nodes:
                fit.load(nodes[source])
                self.acceptance.slope[number], self.acceptance.bias[number] = fit.slope, fit.bias

    def elapsed(self, seconds: float) -> None:
        """Let time pass, by which minutes are judged."""
        self._seconds += seconds
        if self._seconds < 60:
            return
        tried, accepted = self.tried - self._tried_before, self.accepted - self._accepted_before
        self.silent += (tried >= 30) & (accepted < 0.02 * tried)
        self._begin_minute()

    def totals(self) -> dict[str, dict[str, float]]:
        """Return ``expected``, ``accepted`` and ``silent`` by source."""
        sums = (("expected", self.expected), ("accepted", self.accepted), ("silent", self.silent))
        return {name: dict(zip(SOURCES, tokens.tolist(), strict=True)) for name, tokens in sums}

    def _begin_minute(self) -> None:
        self._seconds, self._tried_before, self._accepted_before = 0.0, self.tried.copy(), self.accepted.copy()
