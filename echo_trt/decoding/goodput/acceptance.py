"""P(accept | who proposed it, depth, score): what a drafted node is worth, calibrated and kept true while it runs."""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.arrays import compiled

HEAD, LOOKUP, BOTH, NGRAM = range(4)  # who proposed a node
HORIZON = 2  # levels that are foreseen: one that does not pay by itself may pay with the next
BRANCHING = 5  # levels of a tree that are foreseen with their second best children
SOURCES = ("head", "lookup", "both", "ngram")
CALIBRATED = SOURCES[:NGRAM]  # an n-gram brings its own probability
KNOTS = 65  # of a table; x = exp(score) at (i / 64)^2, finer where probabilities are small
_LEARNING = 0.02
_MOST = 1.5  # the largest shift that drift may cause, in log-odds
_CEILING = 0.999
_USUAL_CHILDREN = np.array([[0.2, 0.4, 0.6, 0.8, 0.95], [0.02, 0.06, 0.1, 0.15, 0.2]])


def knots() -> np.ndarray:
    """The x at which tables hold values: float64 [KNOTS], 0 to 1."""
    return (np.arange(KNOTS) / (KNOTS - 1)) ** 2


class Foreseen:
    """What expanding nodes will bring, before their children are known, where each has so many as ``children`` has.

    ``below`` [depth] is what the best, second best, ... child of a node of that depth will be worth, as a share of the
    node's own probability, and those under the best child: equally likely values, [levels, w, quantiles]. ``brought``
    [depth]: what 1, 2, ... such levels bring in all, [levels]. ``first``: what a root's best child is worth, usually.
    """

    def __init__(self, children: np.ndarray):
        self.first = float(children[0, 0].mean())
        self.below = [_as_shares(children[depth : depth + HORIZON]) for depth in range(len(children))]
        self.brought = [levels.mean(axis=2).sum(axis=1).cumsum() for levels in self.below]
        self._trees = _trees(children[:BRANCHING])

    def best(self, nodes: np.ndarray, requests: int) -> np.ndarray:
        """What the best so many ``nodes`` [n] of the trees of so many ``requests`` together bring, [n].

        Of each tree the best node of each level is expanded.
        """
        together = min(requests, self._trees.shape[1])
        drawn = np.random.default_rng(0).permutation(self._trees.shape[1])
        groups = drawn[: len(drawn) // together * together].reshape(-1, together)
        values = np.sort(self._trees[:, groups].transpose(1, 0, 2).reshape(len(groups), -1), axis=1)[:, ::-1]
        sums = np.concatenate(([0.0], values.mean(axis=0).cumsum()))
        share = together / requests
        return np.interp(nodes * share, np.arange(len(sums)), sums) / share


class Acceptance:
    """``table`` [calibrated, depths, KNOTS]: P(the path to a node is accepted) at exp(score), row d for depth d + 1.

    ``children`` [depths, w, quantiles]: of a node at depth d that is expanded, what its best, second best, ... child
    will be worth, as a share of the node's own probability: equally likely values, ascending. ``drift`` [sources]
    shifts log-odds, learnt from what is verified. ``expected`` and ``accepted`` [sources] are sums over all verified
    nodes: of what each was thought to be worth at its time, and of those accepted.
    """

    def __init__(self, table: np.ndarray, children: np.ndarray):
        self.table, self.children = np.ascontiguousarray(table, np.float64), np.ascontiguousarray(children, np.float64)
        self._foreseen: dict[int, Foreseen] = {}
        self.drift = np.zeros(len(SOURCES))
        self.expected, self.accepted = np.zeros(len(SOURCES)), np.zeros(len(SOURCES))

    def foreseen(self, width: int) -> Foreseen:
        """What nodes with so many children each will bring."""
        if width not in self._foreseen:
            self._foreseen[width] = Foreseen(self.children[:, :width])
        return self._foreseen[width]

    @classmethod
    def uncalibrated(cls, depths: int) -> Acceptance:
        """The draft's own path probability, taken at its word; drift corrects it as it runs."""
        table = np.broadcast_to(knots() * _CEILING, (len(CALIBRATED), depths, KNOTS)).copy()
        return cls(table, np.tile(_USUAL_CHILDREN, (depths, 1, 1)))

    def probability(self, source: np.ndarray, depth: np.ndarray, score: np.ndarray) -> np.ndarray:
        """P(accept) of nodes at ``depth`` >= 1 with log path probability ``score``, all [n]. float64 [n]"""
        source, score = np.ascontiguousarray(source, np.int8), np.ascontiguousarray(score, np.float64)
        return _probability(self.table, self.drift, source, np.ascontiguousarray(depth, np.int64), score)

    def observe(self, source: np.ndarray, probability: np.ndarray, accepted: np.ndarray) -> None:
        """Verified nodes: what each was thought to be worth, and whether it was accepted, all [n]."""
        if len(source) == 0:
            return
        source, accepted = np.ascontiguousarray(source, np.int8), np.ascontiguousarray(accepted, np.float64)
        _observe(self.drift, self.expected, self.accepted, source, np.ascontiguousarray(probability), accepted)

    def totals(self) -> dict[str, dict[str, float]]:
        """``expected`` and ``accepted``, each by source."""
        sums = {"expected": self.expected, "accepted": self.accepted}
        return {what: dict(zip(SOURCES, each.tolist(), strict=True)) for what, each in sums.items()}


def _as_shares(children: np.ndarray) -> np.ndarray:
    """children [levels, w, quantiles], each level's as a share of its parent -> as a share of the first parent."""
    best = np.cumprod(children[:, 0], axis=0)  # of equal quantiles: who is likely goes on to be
    above = np.concatenate((np.ones((1, children.shape[-1])), best[:-1]))
    shares: np.ndarray = above[:, None] * children
    return shares


def _trees(children: np.ndarray) -> np.ndarray:
    """children [levels, w, quantiles], each level's independent of the others' -> what the nodes of trees are worth,
    [levels * w, trees]: every combination of quantiles is one, as likely as any other."""
    levels, _, quantiles = children.shape
    drawn = np.indices((quantiles,) * levels).reshape(levels, -1)
    shares = children[np.arange(levels)[:, None], :, drawn].transpose(0, 2, 1)  # [levels, w, combinations]
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


@compiled("void(f8[::1], f8[::1], f8[::1], i1[::1], f8[::1], f8[::1])")
def _observe(
    drift: np.ndarray,
    all_expected: np.ndarray,
    all_accepted: np.ndarray,
    source: np.ndarray,
    probability: np.ndarray,
    accepted: np.ndarray,
) -> None:
    for each in range(len(drift)):
        count, expected, got = 0, 0.0, 0.0
        for i in range(len(source)):
            if source[i] == each:
                count, expected, got = count + 1, expected + probability[i], got + accepted[i]
        all_expected[each] += expected
        all_accepted[each] += got
        # A step of stochastic gradient on the log-likelihood: unbiased whatever was chosen to be verified.
        step = _LEARNING * (got - expected) / math.sqrt(max(count, 1))
        drift[each] = min(max(drift[each] + step, -_MOST), _MOST)
