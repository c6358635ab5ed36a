"""P(accept) of each source, corrected by the nodes that were verified lately."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.goodput.learner.fit import AcceptanceFit
from echo_trt.speculation.goodput.model.acceptance import DEPTHS, Acceptance, log_odds
from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.sources import SOURCES


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
