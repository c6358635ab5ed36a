"""P(accept | source, depth, score) of drafted nodes, calibrated or not."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.speculation.arrays import compiled
from echo_trt.speculation.sources import NGRAM, SOURCES

DEPTHS = 8  # that have a bias of their own; deeper nodes share the last one
CALIBRATED = SOURCES[:NGRAM]  # the others bring their own probability
KNOTS = 65  # of a table; x = exp(score) at (i / 64)^2, finer where probabilities are small
CALIBRATED_START = 1.0, 0.0  # slope and bias
UNCALIBRATED_START = 0.5, -0.2  # those with which vLLM's adaptive verification begins
MAX_PROBABILITY = 0.999  # of a draft that is sure
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
    """

    def __init__(self, children: np.ndarray, horizon: int):
        self.child_shares = [_as_shares(children[depth : depth + horizon]) for depth in range(len(children))]
        self.added_tokens = [levels.mean(axis=2).sum(axis=1).cumsum() for levels in self.child_shares]
        self._trees = _trees(children[:5])  # deeper trees would be slower to predict

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
        expected: np.ndarray = np.interp(nodes * share, np.arange(len(sums)), sums) / share
        return expected


class Acceptance:
    """P(accept) of candidates: a prior, and its correction by source and depth, which a learner sets.

    The prior is the calibration's table where there is one, else the draft's own path probability.

    calibrated  whether the prior is a calibration's
    table       float64 [calibrated sources, depths, KNOTS]: P(the path to a node is accepted) at exp(score), row d for
                depth d + 1
    children    float64 [depths, width, quantiles]: P(accept) of the best, second best, ... child of an expanded node at
                depth d, divided by that of the node: equally likely values, ascending
    slope       float64 [sources], and
    bias        float64 [sources, DEPTHS]: log-odds of P = slope * log-odds of the prior + bias
    """

    def __init__(self, table: np.ndarray, children: np.ndarray, start: tuple[float, float] = CALIBRATED_START):
        """``start``: slope and bias of the calibrated sources at first."""
        self.calibrated = start == CALIBRATED_START
        self.table, self.children = np.ascontiguousarray(table, np.float64), np.ascontiguousarray(children, np.float64)
        own = np.broadcast_to(knots() * MAX_PROBABILITY, (len(SOURCES) - len(table), *self.table.shape[1:]))
        self._tables = np.concatenate((self.table, own))
        self.slope, self.bias = np.ones(len(SOURCES)), np.zeros((len(SOURCES), DEPTHS))
        self.slope[: len(table)], self.bias[: len(table)] = start
        self._forecasts: dict[tuple[int, int], Forecast] = {}

    @classmethod
    def uncalibrated(cls, depths: int, start: tuple[float, float] = UNCALIBRATED_START) -> Acceptance:
        """Begin with the draft's path probabilities, by default trusted less; a learner corrects them."""
        table = np.broadcast_to(knots() * MAX_PROBABILITY, (len(CALIBRATED), depths, KNOTS)).copy()
        return cls(table, np.tile(_UNCALIBRATED_CHILDREN, (depths, 1, 1)), start)

    def forecast(self, width: int, horizon: int) -> Forecast:
        """Return the forecast for nodes of ``width`` children, ``horizon`` levels ahead."""
        key = width, horizon
        if key not in self._forecasts:
            self._forecasts[key] = Forecast(self.children[:, :width], horizon)
        return self._forecasts[key]

    def probability(self, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Return P(accept) of nodes at ``depth`` >= 1 with log path probability ``score``, all [n]: float64 [n]."""
        x = self.slope[source] * self.prior(source, depth, score)
        p: np.ndarray = 1 / (1 + np.exp(-x - self.bias[source, np.minimum(depth, DEPTHS) - 1]))
        return p

    def prior(self, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Return the log-odds that the tables have: float64 [n]."""
        source, score = np.ascontiguousarray(source, np.int8), np.ascontiguousarray(score, np.float64)
        return log_odds(_read(self._tables, source, np.ascontiguousarray(depth, np.int64), score))


def log_odds(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, 1e-4, MAX_PROBABILITY)
    odds: np.ndarray = np.log(p / (1 - p))
    return odds


def _as_shares(children: np.ndarray) -> np.ndarray:
    """Turn shares of a level's parent, [levels, width, quantiles], into shares of the first level's parent.

    A likely node's children are likely, so that two levels in a row have equal quantiles. Further up the mean stands:
    equal quantiles of many levels would promise that a sure text stays sure.
    """
    best = children[:, 0]
    above = np.ones_like(best)
    above[1:] = best[:-1]
    above[2:] *= best.mean(axis=1).cumprod()[:-2, None]
    shares: np.ndarray = above[:, None] * children
    return shares


def _trees(children: np.ndarray) -> np.ndarray:
    """Return the P(accept) of the nodes of equally likely trees, one per combination of the levels' quantiles.

    children float64 [levels, width, quantiles], levels independent. Returns float64 [levels * width, trees].
    """
    levels, _, quantiles = children.shape
    drawn = np.indices((quantiles,) * levels).reshape(levels, -1)
    shares = children[np.arange(levels)[:, None], :, drawn].transpose(0, 2, 1)  # [levels, width, trees]
    above = np.cumprod(np.concatenate((np.ones_like(shares[:1, 0]), shares[:-1, 0])), axis=0)
    worth: np.ndarray = above[:, None] * shares
    return worth.reshape(-1, drawn.shape[1])


@compiled("f8[::1](f8[:, :, ::1], i1[::1], i8[::1], f8[::1])")
def _read(table: np.ndarray, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
    out = np.empty(len(score))
    for i in range(len(score)):
        values = table[source[i], min(depth[i], table.shape[1]) - 1]
        index = math.sqrt(math.exp(score[i])) * (KNOTS - 1)
        low = min(int(index), KNOTS - 2)
        out[i] = values[low] + (values[low + 1] - values[low]) * (index - low)
    return out
