"""Which size the search's verifications have, where a pass of another size than the last one costs extra.

A search that weighs each size anew changes it whenever that seems worth it, and is mostly wrong: what the change costs
is certain, what it brings is not. Here a size is held for some dozens of iterations and filled with the best
candidates, however good they are. Which one is next is told by what each would have brought so far, and at a load that
is new by what the calibration foresees. Whether it is better than plain decoding is told by turns of both (``turns``).
"""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.goodput.acceptance import Foreseen
from echo_trt.decoding.goodput.costs import Costs
from echo_trt.decoding.goodput.turns import Turns

HELD = 72  # iterations for which a size is kept
_BETTER = 1.05  # times the rate of the size that is held, what another one must be foreseen to have
_MOST = 64  # sizes beyond the requests that are considered, multiples of the granule
_STEP = 1.5  # times as many requests as there were at first may what is learnt of a load be used for
_MEMORY = 0.97  # of running means over iterations
_FORESEEN = 8  # searches that what the calibration foresees is worth
_LEVELS = 1.6  # draft levels that are foreseen, a doubling of a request's verified tokens
_SURE = 1.15  # times what it brings is often foreseen of a load that is new
_OUTLIER = 2.0  # times what was known: drafting that took longer tells no more than that; graphs prepare new sizes


class _Known:
    """Of one load, running means over searches: what the best nodes of each size have ``brought`` [sizes], and the
    seconds of ``drafting`` for it; and ``turns`` of the size that is best and of plain decoding, once it has run."""

    def __init__(self, requests: int, costs: Costs, foreseen: Foreseen) -> None:
        least = math.ceil(costs.least / costs.granule)
        most = _MOST + math.ceil(_STEP * requests / costs.granule)
        self.sizes = costs.granule * np.arange(least, most + 1)
        nodes = np.maximum(self.sizes - requests, 0)
        self.brought = foreseen.best(nodes, requests)
        self.searches = 0
        self.turns: Turns | None = None
        self.left = 0  # the iteration in which another load took its place
        self._best = 0
        self._found = np.zeros(len(nodes))  # of all candidates, however few of them were asked for
        self._slower = np.ones(len(nodes))  # times what is usual, drafting
        self._price(requests, costs, 0.0)

    def _price(self, requests: int, costs: Costs, level: float) -> None:
        """What drafting usually takes just now; ``level``: seconds that a level's planning adds."""
        self._cold, self._level = costs.cold, costs.draft(2 * requests) + level

    def _usual(self, requests: int) -> np.ndarray:
        """Seconds of drafting for each size; none for those that hold no more than the roots of ``requests``."""
        each = np.maximum(self.sizes - requests, 0) / requests
        levels = np.minimum(_LEVELS * np.log2(1 + each), each)  # none without a node
        return (levels > 0) * self._cold + levels * self._level

    def drafting(self, requests: int) -> np.ndarray:
        seconds: np.ndarray = self._slower * self._usual(requests)
        return seconds

    def learn(self, probability: np.ndarray, requests: int, drafting: float | None, size: int) -> None:
        """Update what each size is thought to bring from one search at the held ``size``: smaller ones directly. Larger
        ones keep their proportion to it, unless the search has found more: it drafts no further than the held size
        needs."""
        self.searches += 1
        step = max(1 - _MEMORY, 1 / (self.searches + _FORESEEN))
        held = min(int(np.searchsorted(self.sizes, size)), len(self.sizes) - 1)
        _learn(self.brought, self._found, self.sizes, requests, held, np.ascontiguousarray(probability), step)
        if drafting is not None:
            _slow(self._slower, self._usual(requests), held, drafting, step)

    def best(self, requests: int, context: int, costs: Costs, host: float, level: float) -> tuple[int, float]:
        """The size that would have brought most tokens a second, and how many times plain decoding's that is by the
        tables. The one that was best stays it where no other is better by much, unless it loses."""
        self._price(requests, costs, level)
        stays = self.turns is None or self.turns.gain > 0
        sizes, nodes = self.sizes, np.maximum(self.sizes - requests, 0)
        target = costs.target.base(int(sizes[-1]))[sizes] + costs.target.per_context * context
        seconds = target + costs.target.per_node * nodes * context / requests + self.drafting(requests) + host
        rate = np.where(nodes > 0, (requests + self.brought) / seconds, 0.0)
        self._best = int(sizes[np.where(stays & (sizes == self._best), _BETTER * rate, rate).argmax()])
        plain = requests / (costs.plain(requests, context) + host)
        return self._best, float(rate[sizes == self._best][0] / plain)


class Sizes:
    """``held``: the tokens of each verification for now, 0 where plain decoding is better."""

    def __init__(self) -> None:
        self.held, self._left, self._iteration = 0, 0, 0
        self._load, self._here = -2, False  # whose turns these are, and whether it was seen in this one
        self._known: dict[int, _Known] = {}

    def nodes(
        self, requests: int, context: int, costs: Costs, host: float, foreseen: Foreseen, level: float = 0.0
    ) -> int | None:
        """How many nodes beside the roots of so many ``requests`` are verified; None: as many as pay.

        ``context``: cached tokens of all. ``host``: seconds of an iteration beside its passes, ``level``: of planning a
        draft level. ``foreseen`` counts where nothing else is known.
        """
        if costs.change <= 0 or requests == 0:
            return None
        self._left, self._iteration = self._left - 1, self._iteration + 1
        load = load_of(requests)
        if load not in self._known:
            self._known[load] = _Known(requests, costs, foreseen)
        self._here |= load == self._load
        turns = self._known[self._load].turns if self._load in self._known else None
        if turns is None or abs(load - self._load) > 1 or 0 < self.held <= requests or turns.tick():
            best, gain = self._known[load].best(requests, context, costs, host, level)
            self._choose(load, requests, best, gain)
        return max(self.held - requests, 0)

    def _choose(self, load: int, requests: int, best: int, gain: float) -> None:
        """The turn is over, or the load is another one. ``best`` size by the tables, which foresee ``gain``.

        A load that is a step away may come and go, and shares the turns until it stays for one.
        """
        known, before = self._known[load], self._known.get(self._load)
        moved = abs(load - self._load) > 1 or not self._here
        if moved and before:
            before.left = self._iteration
        shared = before.turns if before else None
        if shared and not moved:
            turns = shared
            turns.next()
        elif known.turns:
            turns = known.turns
            turns.resume(self._iteration - known.left)
        elif shared and abs(load - self._load) == 1:
            turns = known.turns = shared.carried_to(requests)
        else:
            turns = known.turns = Turns(requests, math.log(gain / _SURE))
        self._load, self._here = load if moved else self._load, False
        if turns.speculates and (moved or self._left < 0 or self.held <= requests):
            turns.hold(best)
            self._left = HELD - 1
        self.held = turns.size if turns.speculates else 0

    def spent(self, seconds: float, progress: float) -> None:
        """An iteration took ``seconds`` for ``progress`` tokens a request."""
        if (known := self._known.get(self._load)) and known.turns:
            known.turns.spent(seconds, progress)

    def observe(self, probability: np.ndarray, requests: int, drafting: float | None) -> None:
        """A search has found candidates of ``probability`` [n], roots apart, and taken ``drafting`` seconds for it;
        None if that says nothing of the next one."""
        known = self._known.get(load_of(requests)) if requests else None
        if known and self.held > requests:
            known.learn(probability, requests, drafting, self.held)


def load_of(requests: int) -> int:
    """Numbers of ``requests`` that what is learnt of one holds for: a step is a factor of 1.4, or 1 to 2."""
    return max(round(2 * math.log2(requests)), 1)


@compiled("void(f8[::1], f8[::1], i8[::1], i8, i8, f8[::1], f8)")
def _learn(
    brought: np.ndarray,
    found: np.ndarray,
    sizes: np.ndarray,
    requests: int,
    held: int,
    probability: np.ndarray,
    step: float,
) -> None:
    """Move what the best nodes of each of ``sizes`` have ``brought`` and were ``found`` to bring towards a search's;
    of sizes larger than the one held, what they brought by the same share: texts that are hard are so for all."""
    best, total, last, change = np.sort(probability)[::-1], 0.0, 0, 1.0
    for i in range(len(sizes)):
        nodes = min(max(sizes[i] - requests, 0), len(best))
        total += best[last:nodes].sum()
        last = nodes
        found[i] += step * (total - found[i])
        if i <= held:
            before, brought[i] = brought[i], brought[i] + step * (total - brought[i])
            change = min(brought[i] / before, 1 + step) if before > 0 else 1.0
        else:
            brought[i] *= change
        brought[i] = max(brought[i], found[i])


@compiled("void(f8[::1], f8[::1], i8, f8, f8)")
def _slow(slower: np.ndarray, usual: np.ndarray, held: int, drafting: float, step: float) -> None:
    """Move by how much drafting has been ``slower`` than ``usual`` towards ``drafting`` seconds for the size held: by
    the same share for smaller sizes, which draft less, and for larger ones by the same seconds."""
    drafting, change = min(drafting, _OUTLIER * usual[held] * max(slower[held], 1.0)), 0.0
    for i in range(len(usual)):
        if usual[i] > 0:
            if i <= held:
                change = step * (drafting * usual[i] / usual[held] - slower[i] * usual[i])
            slower[i] = max(slower[i] + change / usual[i], 0.0)
