"""P(accept | source, depth, score) of drafted nodes: calibrated or not, and learnt while it runs."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.goodput.fit import DEPTHS, Fit
from echo_trt.decoding.sources import NGRAM, SOURCES

HORIZON = 2  # levels forecast before a draft; larger: levels that pay only with the next ones are drafted, too
BRANCHING = 5  # levels of the trees that a rung is forecast from; larger: deeper trees, and slower
CALIBRATED = SOURCES[:NGRAM]  # the others bring their own probability
KNOTS = 65  # of a table; x = exp(score) at (i / 64)^2, finer where probabilities are small
CALIBRATED_START = 1.0, 0.0  # slope and bias
UNCALIBRATED_START = 0.5, -0.2  # those with which vLLM's adaptive verification begins
_SUREST = 0.999  # P(accept) of a draft that is sure, at most; larger: fits correct it later
_LEAST = 1e-4  # P(accept) at least; larger: unlikely nodes are not told apart
_TRIED, _SILENT = 30, 0.02  # nodes in a minute, and a share of them: with fewer accepted the source is silent
_UNCALIBRATED_CHILDREN = np.array([[0.2, 0.4, 0.6, 0.8, 0.95], [0.02, 0.06, 0.1, 0.15, 0.2]])


def knots() -> np.ndarray:
    """Return the x at which tables hold values: float64 [KNOTS], 0 to 1."""
    return (np.arange(KNOTS) / (KNOTS - 1)) ** 2


class Forecast:
    """Forecast of what expanding a node adds, from the calibration's child values.

    child_shares[d]  float64 [levels, width, quantiles]: P(accept) of a child divided by P(accept) of the expanded
                     node at depth d; each further level hangs below the best child of the level before
    added_tokens[d]  float64 [levels]: expected accepted tokens that 1, 2, ... levels below a node at depth d add,
                     divided by the node's P(accept)
    first            mean P(accept) of a root's best child
    """

    def __init__(self, children: np.ndarray, horizon: int = HORIZON):
        self.first = float(children[0, 0].mean())
        self.child_shares = [_as_shares(children[depth : depth + horizon]) for depth in range(len(children))]
        self.added_tokens = [levels.mean(axis=2).sum(axis=1).cumsum() for levels in self.child_shares]
        self._trees = _trees(children[:BRANCHING])

    def expected_tokens(self, nodes: np.ndarray, requests: int) -> np.ndarray:
        """Return the expected accepted tokens when the best ``nodes`` candidates of ``requests`` trees are verified.

        nodes int64 [n]. Returns float64 [n]. A tree's best node of a level is expanded.
        """
        together = min(requests, self._trees.shape[1])
        drawn = np.random.default_rng(0).permutation(self._trees.shape[1])
        groups = drawn[: len(drawn) // together * together].reshape(-1, together)
        values = np.sort(self._trees[:, groups].transpose(1, 0, 2).reshape(len(groups), -1), axis=1)[:, ::-1]
        sums = np.concatenate(([0.0], values.mean(axis=0).cumsum()))
        share = together / requests
        return np.interp(nodes * share, np.arange(len(sums)), sums) / share


class Acceptance:
    """P(accept) of candidates: a prior, corrected by what was verified lately (``Fit``, one a source).

    The prior is the calibration's table where there is one, else the draft's own path probability.

    calibrated          whether the prior is a calibration's
    table               float64 [calibrated sources, depths, KNOTS]: P(the path to a node is accepted) at exp(score),
                        row d for depth d + 1
    children            float64 [depths, width, quantiles]: P(accept) of the best, second best, ... child of an expanded
                        node at depth d, divided by that of the node: equally likely values, ascending
    slope               float64 [sources], and
    bias                float64 [sources, DEPTHS]: log-odds of P = slope * log-odds of the prior + bias
    tried, expected, accepted  float64 [sources]: verified nodes, the sum of their P(accept), and those accepted
    silent              int64 [sources]: minutes in which a source was tried and hardly anything of it was accepted
    """

    def __init__(self, table: np.ndarray, children: np.ndarray, start: tuple[float, float] = CALIBRATED_START):
        """``start``: slope and bias of the calibrated sources at first."""
        self.calibrated = start == CALIBRATED_START
        self.table, self.children = np.ascontiguousarray(table, np.float64), np.ascontiguousarray(children, np.float64)
        own = np.broadcast_to(knots() * _SUREST, (len(SOURCES) - len(table), *self.table.shape[1:]))
        self._tables = np.concatenate((self.table, own))
        self._fits = [Fit(*start) if i < len(table) else Fit(1.0, 0.0, fixed=True) for i in range(len(SOURCES))]
        self._forecasts: dict[tuple[int, int], Forecast] = {}
        self.tried, self.expected, self.accepted = np.zeros((3, len(SOURCES)))
        self.silent = np.zeros(len(SOURCES), np.int64)
        self._begin_minute()
        self._adopt()

    def forecast(self, width: int, horizon: int = HORIZON) -> Forecast:
        """Return the forecast for nodes of ``width`` children, ``horizon`` levels ahead."""
        key = width, horizon
        if key not in self._forecasts:
            self._forecasts[key] = Forecast(self.children[:, :width], horizon)
        return self._forecasts[key]

    @classmethod
    def uncalibrated(cls, depths: int, start: tuple[float, float] = UNCALIBRATED_START) -> Acceptance:
        """Begin with the draft's path probabilities, by default trusted less; fits correct them while it runs."""
        table = np.broadcast_to(knots() * _SUREST, (len(CALIBRATED), depths, KNOTS)).copy()
        return cls(table, np.tile(_UNCALIBRATED_CHILDREN, (depths, 1, 1)), start)

    def probability(self, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Return P(accept) of nodes at ``depth`` >= 1 with log path probability ``score``, all [n]: float64 [n]."""
        prior = self._prior(source, depth, score)
        return _sigmoid(self.slope[source] * prior + self.bias[source, np.minimum(depth, DEPTHS) - 1])

    def observe(
        self, source: np.ndarray, depth: np.ndarray, score: np.ndarray, probability: np.ndarray, accepted: np.ndarray
    ) -> None:
        """Learn from verified nodes, all [n]: their ``probability`` then, and whether they were ``accepted``."""
        self.tried += np.bincount(source, minlength=len(SOURCES))
        self.expected += np.bincount(source, probability, len(SOURCES))
        self.accepted += np.bincount(source, accepted, len(SOURCES))
        place = np.minimum(depth, DEPTHS) - 1
        own = source >= len(self.table)  # their probability was corrected by this bias already
        prior = np.empty(len(source))
        prior[own] = _log_odds(probability[own]) - self.bias[source[own], place[own]]
        prior[~own] = self._prior(source[~own], depth[~own], score[~own])
        learnt = False
        for number, fit in enumerate(self._fits):
            mine = source == number
            learnt |= fit.observe(prior[mine], place[mine], accepted[mine])
        if learnt:
            self._adopt()

    def elapsed(self, seconds: float) -> None:
        """Let time pass, by which minutes are judged."""
        self._seconds += seconds
        if self._seconds < 60:
            return
        tried, accepted = self.tried - self._tried_before, self.accepted - self._accepted_before
        self.silent += (tried >= _TRIED) & (accepted < _SILENT * tried)
        self._begin_minute()

    def totals(self) -> dict[str, dict[str, float]]:
        """Return ``expected``, ``accepted`` and ``silent`` by source."""
        sums = (("expected", self.expected), ("accepted", self.accepted), ("silent", self.silent))
        return {name: dict(zip(SOURCES, tokens.tolist(), strict=True)) for name, tokens in sums}

    def _begin_minute(self) -> None:
        self._seconds, self._tried_before, self._accepted_before = 0.0, self.tried.copy(), self.accepted.copy()

    def _adopt(self) -> None:
        self.slope = np.array([fit.slope for fit in self._fits])
        self.bias = np.array([fit.bias for fit in self._fits])

    def _prior(self, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Return the log-odds that the tables have: float64 [n]."""
        source, score = np.ascontiguousarray(source, np.int8), np.ascontiguousarray(score, np.float64)
        return _log_odds(_read(self._tables, source, np.ascontiguousarray(depth, np.int64), score))


def _as_shares(children: np.ndarray) -> np.ndarray:
    """Turn shares of a level's parent, [levels, width, quantiles], into shares of the first level's parent."""
    best = np.cumprod(children[:, 0], axis=0)  # of equal quantiles: a likely node's children are likely
    above = np.concatenate((np.ones((1, children.shape[-1])), best[:-1]))
    shares: np.ndarray = above[:, None] * children
    return shares


def _trees(children: np.ndarray) -> np.ndarray:
    """Return the P(accept) of the nodes of equally likely trees, one a combination of the levels' quantiles.

    children float64 [levels, width, quantiles], levels independent. Returns float64 [levels * width, trees].
    """
    levels, _, quantiles = children.shape
    drawn = np.indices((quantiles,) * levels).reshape(levels, -1)
    shares = children[np.arange(levels)[:, None], :, drawn].transpose(0, 2, 1)  # [levels, width, trees]
    above = np.cumprod(np.concatenate((np.ones_like(shares[:1, 0]), shares[:-1, 0])), axis=0)
    worth: np.ndarray = above[:, None] * shares
    return worth.reshape(-1, drawn.shape[1])


def _log_odds(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, _LEAST, _SUREST)
    odds: np.ndarray = np.log(p / (1 - p))
    return odds


def _sigmoid(log_odds: np.ndarray) -> np.ndarray:
    p: np.ndarray = 1 / (1 + np.exp(-log_odds))
    return p


@compiled("f8[::1](f8[:, :, ::1], i1[::1], i8[::1], f8[::1])")
def _read(table: np.ndarray, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
    out = np.empty(len(score))
    for i in range(len(score)):
        values = table[source[i], min(depth[i], table.shape[1]) - 1]
        place = math.sqrt(math.exp(score[i])) * (KNOTS - 1)
        low = min(int(place), KNOTS - 2)
        out[i] = values[low] + (values[low + 1] - values[low]) * (place - low)
    return out
