"""Which size the search's verifications have, where a pass of another size than the last one costs extra.

A search that weighs each size anew changes it whenever that seems worth it, and is mostly wrong: what the change costs
is certain, what it brings is not. Here a size is held for some dozens of iterations and filled with the best
candidates, however good they are. Which one is next is told by what each would have brought so far.
"""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.costs import Costs

HELD = 72  # iterations for which a size is kept
_LOOKING = 12  # iterations of any size, at a load of which nothing is known or where nothing paid the last time
_MOST = 64  # sizes that are considered, multiples of the granule
_MEMORY = 0.97  # of running means over iterations


class _Known:
    """Of one load, running means over searches: ``brought`` [sizes], and the seconds of drafting."""

    def __init__(self) -> None:
        self.brought, self.drafting, self.searches = np.zeros(_MOST), 0.0, 0

    def learn(self, brought: np.ndarray, drafting: float) -> None:
        self.searches += 1
        step = max(1 - _MEMORY, 1 / self.searches)
        self.brought += step * (brought - self.brought)
        self.drafting += step * (drafting - self.drafting)


class Sizes:
    """``held``: the tokens of each verification for now, 0 where plain decoding is better; while ``looking``, any."""

    def __init__(self) -> None:
        self.held, self.looking, self._left, self._load = 0, False, 0, -1
        self._known: dict[int, _Known] = {}

    def nodes(self, requests: int, context: int, costs: Costs, host: float) -> int | None:
        """How many nodes beside the roots of so many ``requests`` are verified; None: as many as pay.

        ``context``: cached tokens of all. ``host``: seconds of an iteration beside its passes.
        """
        if costs.change == 0 or requests == 0:
            return None
        self._left -= 1
        load = load_of(requests)
        if self._left < 0 or abs(load - self._load) > 1:
            looked = self.looking and load == self._load
            best = self._best(requests, context, costs, host)
            self.looking = best is None or (best == 0 and not looked)  # what was known may be so no longer
            self.held = best or 0
            self._load, self._left = load, (_LOOKING if self.looking else HELD) - 1
        return None if self.looking else max(self.held - requests, 0)

    def observe(self, probability: np.ndarray, requests: int, costs: Costs, drafting: float) -> None:
        """A search has found candidates of ``probability`` [n], roots apart, and taken ``drafting`` seconds for it."""
        if costs.change and requests:
            best = np.concatenate(([0.0], np.cumsum(np.sort(probability)[::-1])))
            nodes = np.clip(_sizes(costs) - requests, 0, len(probability))
            self._known.setdefault(load_of(requests), _Known()).learn(best[nodes], drafting)

    def _best(self, requests: int, context: int, costs: Costs, host: float) -> int | None:
        """The size that would have brought most tokens a second; 0 if none beats plain decoding; None: too little is
        known."""
        known = self._known.get(load_of(requests))
        if known is None or known.searches < _LOOKING // 2:
            return None
        sizes = _sizes(costs)
        nodes = np.maximum(sizes - requests, 0)
        target = costs.target.base(int(sizes[-1]))[sizes] + costs.target.per_context * context
        seconds = target + costs.target.per_node * nodes * context / requests + known.drafting + host
        rate = np.where(nodes > 0, (requests + known.brought) / seconds, 0.0)
        plain = requests / (costs.target(max(requests, costs.least), context) + host)
        return int(sizes[rate.argmax()]) if rate.max() > plain else 0


def load_of(requests: int) -> int:
    """Numbers of ``requests`` that what is learnt of one holds for: a step is a factor of 1.4."""
    return round(2 * math.log2(requests))


def _sizes(costs: Costs) -> np.ndarray:
    return costs.granule * np.arange(1, _MOST + 1)
