"""Which size the search's verifications have, where a pass of another size than the last one costs extra.

A search that weighs each size anew changes it whenever that seems worth it, and is mostly wrong: what the change costs
is certain, what it brings is not. Here a size is held for some dozens of iterations and filled with the best
candidates, however good they are. Which one is next is told by what each would have brought so far, and at a load that
is new by what the calibration foresees. Whether it is better than plain decoding is told by duels alone (``duel``).
"""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.acceptance import Foreseen
from echo_trt.decoding.costs import Costs
from echo_trt.decoding.duel import Duel

HELD = 72  # iterations for which a size is kept, or plain decoding
_LOST = 0.01  # of the time, what duels may cost
_RESTS = (7.5, 15.0, 30.0)  # seconds before another duel, at least: after one defeat, two, more; never longer
_REMEMBERED, _PROMISED = 4.0, 1.0  # turns that what earlier duels have shown is worth, and what is foreseen at first
_LIKE = 1.5  # times a size or a fraction of it: one that what is known of it holds for
_BETTER = 1.05  # times the rate of the size that is held, what another one must be foreseen to have
_MOST = 64  # sizes beyond the requests that are considered, multiples of the granule
_STEP = 1.5  # times as many requests as there were at first may what is learnt of a load be used for
_MEMORY = 0.97  # of running means over iterations
_FORESEEN = 8  # searches that what the calibration foresees is worth
_LEVELS = 1.6  # draft levels that are foreseen, a doubling of a request's verified tokens
_SURE = 1.1  # times plain decoding, what must be foreseen of a load that is new
_OUTLIER = 2.0  # times what was known: drafting that took longer tells no more than that; graphs prepare new sizes


class _Known:
    """Of one load, running means over searches: what the best nodes of each size have ``brought`` [sizes], and the
    seconds of ``drafting`` for it; and what duels have shown."""

    def __init__(self, requests: int, costs: Costs, foreseen: Foreseen) -> None:
        most = costs.granule * (_MOST + math.ceil(_STEP * requests / costs.granule))
        self.sizes = np.arange(costs.granule, most + 1, costs.granule)
        nodes = np.maximum(self.sizes - requests, 0)
        levels = _LEVELS * np.log2(1 + nodes / requests)
        self._requests = requests
        self._usual = (nodes > 0) * costs.cold + levels * costs.draft(2 * requests)
        self.brought, self.drafting = foreseen.best(nodes, requests), self._usual.copy()
        self.searches = 0
        self.pays: bool | None = None  # None: not known yet
        self.gain, self.weight, self.size = 0.0, 0.0, 0  # what duels have shown, as there, and of which size
        self.defeats = 0  # of them, in a row
        self.debt = self.forgone = 0.0  # seconds that duels have lost to either side, less what they may
        self._best = 0
        self._found = np.zeros(len(nodes))  # of all candidates, however few of them were asked for

    def learn(self, probability: np.ndarray, requests: int, drafting: float | None, size: int) -> None:
        """A search for the best of ``size`` drafts no further than that needs: what larger ones would add is as it was,
        if it has not found more, and so is what others take to draft."""
        self.searches += 1
        best = np.concatenate(([0.0], np.cumsum(np.sort(probability)[::-1])))
        brought = best[np.clip(self.sizes - requests, 0, len(probability))]
        held = min(int(np.searchsorted(self.sizes, size)), len(self.sizes) - 1)
        step = max(1 - _MEMORY, 1 / (self.searches + _FORESEEN))
        change = step * (brought - self.brought)
        change[held:] = change[held]
        self._found += step * (brought - self._found)
        self.brought = np.maximum(self.brought + change, self._found)
        if drafting is not None:
            bound = _OUTLIER * max(self.drafting[held], self._usual[held])
            self.drafting[held] += step * (min(drafting, bound) - self.drafting[held])

    def duel(self, size: int) -> Duel:
        """``size`` against plain decoding, with what is known of one like it."""
        like = 1 / _LIKE < size / max(self.size, 1) < _LIKE
        self.size = size
        return Duel(size, self._requests, self.gain, self.weight * like)

    def promised(self, size: int, gain: float) -> None:
        """``size`` is foreseen to have ``gain`` times plain decoding's rate, and no duel has told."""
        self.gain, self.weight, self.size = math.log(gain), _PROMISED, size

    def decide(self, pays: bool, duel: Duel) -> None:
        """``duel`` is over."""
        self.pays, self.gain, self.weight = pays, duel.gain, min(duel.weight, _REMEMBERED)
        lost, forgone = duel.losses()
        self.owe(max(lost, 0.0 if pays else self._defeated()), forgone)
        self.defeats = 0 if pays else self.defeats

    def doubt(self) -> None:
        """It is foreseen not to pay, and what is foreseen may be wrong."""
        self.pays = False
        self.owe(self._defeated(), 0.0)

    def _defeated(self) -> float:
        self.defeats += 1
        self._best = 0  # no longer held, so that it needs no better one to make room
        return _LOST * _RESTS[min(self.defeats, len(_RESTS)) - 1]

    def owe(self, lost: float, forgone: float) -> None:
        self.debt = min(max(self.debt + lost, 0.0), _LOST * _RESTS[-1])
        self.forgone = min(max(self.forgone + forgone, 0.0), _LOST * _RESTS[-1])

    def best(self, requests: int, context: int, costs: Costs, host: float) -> tuple[int, float]:
        """The size that would have brought most tokens a second, and how many times plain decoding's that is by the
        tables. The one that was best stays it where no other is better by much."""
        sizes, nodes = self.sizes, np.maximum(self.sizes - requests, 0)
        target = costs.target.base(int(sizes[-1]))[sizes] + costs.target.per_context * context
        seconds = target + costs.target.per_node * nodes * context / requests + self.drafting + host
        rate = np.where(nodes > 0, (requests + self.brought) / seconds, 0.0)
        self._best = int(sizes[np.where(sizes == self._best, _BETTER * rate, rate).argmax()])
        plain = requests / (costs.plain(requests, context) + host)
        return self._best, float(rate[sizes == self._best][0] / plain)


class Sizes:
    """``held``: the tokens of each verification for now, 0 where plain decoding is better."""

    def __init__(self) -> None:
        self.held, self._left, self._load = 0, 0, -1
        self._duel: Duel | None = None
        self._known: dict[int, _Known] = {}

    def nodes(self, requests: int, context: int, costs: Costs, host: float, foreseen: Foreseen) -> int | None:
        """How many nodes beside the roots of so many ``requests`` are verified; None: as many as pay.

        ``context``: cached tokens of all. ``host``: seconds of an iteration beside its passes. ``foreseen`` counts
        where nothing else is known.
        """
        if costs.change <= 0 or requests == 0:
            return None
        self._left -= 1
        load = load_of(requests)
        if load not in self._known:
            self._known[load] = _Known(requests, costs, foreseen)
        over = self._duel.over() if self._duel else self._left < 0
        if over or abs(load - self._load) > 1:
            self._choose(load, requests, context, costs, host)
        return max(self.held - requests, 0)

    def _choose(self, load: int, requests: int, context: int, costs: Costs, host: float) -> None:
        known = self._known[load]
        best, gain = known.best(requests, context, costs, host)
        stays, self._load = abs(load - self._load) <= 1, load
        if not stays:
            self._duel = None
        if self._duel:
            pays = self._duel.turned()
            if pays is not None:
                known.decide(pays, self._duel)
                self._duel = None
        elif known.pays is None and gain < _SURE:
            known.doubt()
        elif known.pays is None:
            known.promised(best, gain)
            self._duel = known.duel(best)
        elif stays and (known.forgone if known.pays else known.debt) <= 0:
            self._duel = known.duel(best)
        self.held = self._duel.size if self._duel else best if known.pays else 0
        self._left = HELD - 1

    def spent(self, seconds: float, progress: float) -> None:
        """An iteration took ``seconds`` for ``progress`` tokens a request."""
        if known := self._known.get(self._load):
            if self._duel:
                self._duel.spent(seconds, progress)
            else:
                known.owe(-_LOST * seconds, -_LOST * seconds)

    def observe(self, probability: np.ndarray, requests: int, drafting: float | None) -> None:
        """A search has found candidates of ``probability`` [n], roots apart, and taken ``drafting`` seconds for it;
        None if that says nothing of the next one."""
        known = self._known.get(load_of(requests)) if requests else None
        if known and self.held > requests:
            known.learn(probability, requests, drafting, self.held)


def load_of(requests: int) -> int:
    """Numbers of ``requests`` that what is learnt of one holds for: a step is a factor of 1.4."""
    return round(2 * math.log2(requests))
