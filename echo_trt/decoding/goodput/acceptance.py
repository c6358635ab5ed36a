"""P(accept | source, depth, score) of drafted nodes: calibrated, and corrected while it runs."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.arrays import compiled

HEAD, LOOKUP, BOTH, NGRAM, GRAMMAR = range(5)  # who proposed a node
HORIZON = 2  # levels forecast before a draft; larger: levels that pay only with the next ones are drafted, too
BRANCHING = 5  # levels of the trees that a rung is forecast from; larger: deeper trees, and slower
SOURCES = ("head", "lookup", "both", "ngram", "grammar")
CALIBRATED = SOURCES[:NGRAM]  # the others bring their own probability
KNOTS = 65  # of a table; x = exp(score) at (i / 64)^2, finer where probabilities are small
_LEARNING = 0.02  # step of drift; larger: it follows changed texts sooner, and noise too
_DRIFT_LIMIT = 1.5  # log-odds; larger: a calibration may be overruled further
_UNCALIBRATED_LIMIT = 0.999  # P(accept) of a draft that is sure; larger: drift corrects it later
_UNCALIBRATED_CHILDREN = np.array([[0.2, 0.4, 0.6, 0.8, 0.95], [0.02, 0.06, 0.1, 0.15, 0.2]])


def knots() -> np.ndarray:
    """Return the x at which tables hold values: float64 [KNOTS], 0 to 1."""
    return (np.arange(KNOTS) / (KNOTS - 1)) ** 2


class Forecast:
    """Forecast of what expanding a node adds, from the calibration's child values.

    below[d]    float64 [levels, width, quantiles]: a child's P(accept) divided by that of the expanded node at depth d,
                under the best child of each level
    brought[d]  float64 [levels]: accepted tokens added by 1, 2, ... levels
    first       mean P(accept) of a root's best child
    """

    def __init__(self, children: np.ndarray, horizon: int = HORIZON):
        self.first = float(children[0, 0].mean())
        self.below = [_as_shares(children[depth : depth + horizon]) for depth in range(len(children))]
        self.brought = [levels.mean(axis=2).sum(axis=1).cumsum() for levels in self.below]
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
    """P(accept) of candidates, by tables of the calibration, and sums over verified nodes.

    table               float64 [calibrated sources, depths, KNOTS]: P(the path to a node is accepted) at exp(score),
                        row d for depth d + 1
    children            float64 [depths, width, quantiles]: P(accept) of the best, second best, ... child of an expanded
                        node at depth d, divided by that of the node: equally likely values, ascending
    drift               float64 [sources]: shift of the log-odds, learnt from verified nodes
    expected, accepted  float64 [sources]: tokens, summed over verified nodes
    """

    def __init__(self, table: np.ndarray, children: np.ndarray):
        self.table, self.children = np.ascontiguousarray(table, np.float64), np.ascontiguousarray(children, np.float64)
        own = np.broadcast_to(knots() * _UNCALIBRATED_LIMIT, (len(SOURCES) - len(table), *self.table.shape[1:]))
        self._tables = np.concatenate((self.table, own))
        self._forecasts: dict[tuple[int, int], Forecast] = {}
        self.drift = np.zeros(len(SOURCES))
        self.expected, self.accepted = np.zeros(len(SOURCES)), np.zeros(len(SOURCES))

    def forecast(self, width: int, horizon: int = HORIZON) -> Forecast:
        """Return the forecast for nodes of ``width`` children, ``horizon`` levels ahead."""
        key = width, horizon
        if key not in self._forecasts:
            self._forecasts[key] = Forecast(self.children[:, :width], horizon)
        return self._forecasts[key]

    @classmethod
    def uncalibrated(cls, depths: int) -> Acceptance:
        """Take the draft's path probabilities at their word; drift corrects them while it runs."""
        table = np.broadcast_to(knots() * _UNCALIBRATED_LIMIT, (len(CALIBRATED), depths, KNOTS)).copy()
        return cls(table, np.tile(_UNCALIBRATED_CHILDREN, (depths, 1, 1)))

    def probability(self, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Return P(accept) of nodes at ``depth`` >= 1 with log path probability ``score``, all [n]: float64 [n]."""
        source, score = np.ascontiguousarray(source, np.int8), np.ascontiguousarray(score, np.float64)
        return _probability(self._tables, self.drift, source, np.ascontiguousarray(depth, np.int64), score)

    def observe(self, source: np.ndarray, probability: np.ndarray, accepted: np.ndarray) -> None:
        """Learn from verified nodes: their ``probability`` float64 [n] then, and whether they were ``accepted`` [n]."""
        count = np.bincount(source, minlength=len(SOURCES))
        expected = np.bincount(source, probability, len(SOURCES))
        came_true = np.bincount(source, accepted, len(SOURCES))
        self.expected += expected
        self.accepted += came_true
        # A step of stochastic gradient on the log-likelihood: unbiased whatever was chosen to be verified.
        step = _LEARNING * (came_true - expected) / np.sqrt(np.maximum(count, 1))
        np.clip(self.drift + step, -_DRIFT_LIMIT, _DRIFT_LIMIT, out=self.drift)

    def totals(self) -> dict[str, dict[str, float]]:
        """Return ``expected`` and ``accepted`` by source."""
        sums = (("expected", self.expected), ("accepted", self.accepted))
        return {name: dict(zip(SOURCES, tokens.tolist(), strict=True)) for name, tokens in sums}


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


@compiled("f8[::1](f8[:, :, ::1], f8[::1], i1[::1], i8[::1], f8[::1])")
def _probability(
    table: np.ndarray, drift: np.ndarray, source: np.ndarray, depth: np.ndarray, score: np.ndarray
) -> np.ndarray:
    out = np.empty(len(score))
    for i in range(len(score)):
        values = table[source[i], min(depth[i], table.shape[1]) - 1]
        place = math.sqrt(math.exp(score[i])) * (KNOTS - 1)
        low = min(int(place), KNOTS - 2)
        known = values[low] + (values[low + 1] - values[low]) * (place - low)
        odds = math.exp(drift[source[i]])
        out[i] = known * odds / (1 - known + known * odds)
    return out
