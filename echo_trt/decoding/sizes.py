"""Which size the search's verifications have, where a pass of another size than the last one costs extra.

A search that weighs each size anew changes it whenever that seems worth it, and is mostly wrong: what the change costs
is certain, what it brings is not. Here a size is held for some dozens of iterations and filled with the best
candidates, however good they are. Which one is next is told by what each would have brought so far, and at a load that
is new by what the calibration foresees.
"""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.acceptance import Foreseen
from echo_trt.decoding.costs import Costs

HELD = 72  # iterations for which a size is kept
_FIRST = 24  # the same of a load's first size, which nothing but the calibration speaks for
_LOOKING = 12  # iterations of the best size after plain decoding, to see whether it would pay again
_COMPARING = 8  # iterations of plain decoding between two of a size that pays, to see whether it does
_TELLING = 16  # iterations that tell half of the truth of what was gained
_TRUSTED = 1.2  # times what was foreseen, what is believed to have been gained
_SETTLING = 4  # iterations that do not tell whether a size pays: drafts catch up after a rest
_LOST, _LONGEST_REST = 0.01, 30.0  # what such trials may lose of the time; seconds after which there is one anyway
_MOST = 64  # sizes beyond the requests that are considered, multiples of the granule
_STEP = 1.5  # times as many requests as were there at first may what is learnt of a load be used for
_MEMORY = 0.97  # of running means over iterations
_FORESEEN = 8  # searches that what the calibration foresees is worth
_LEVELS = 1.6  # draft levels that are foreseen, a doubling of a request's verified tokens
_SURE = 1.1  # times plain decoding, what must be foreseen of a load that is new
_OUTLIER = 2.0  # times what was known: drafting that took longer tells no more than that; graphs prepare new sizes


class _Known:
    """Of one load, running means over searches: what the best nodes of each size have ``brought`` [sizes], and the
    seconds of ``drafting`` for it. ``trust``: what was gained, of what was to be gained by these."""

    def __init__(self, requests: int, costs: Costs, foreseen: Foreseen, trust: float) -> None:
        most = costs.granule * (_MOST + math.ceil(_STEP * requests / costs.granule))
        self.sizes = np.arange(costs.granule, most + 1, costs.granule)
        nodes = np.maximum(self.sizes - requests, 0)
        levels = _LEVELS * np.log2(1 + nodes / requests)
        self._usual = (nodes > 0) * costs.cold + levels * costs.draft(2 * requests)
        self.brought, self.drafting = foreseen.best(nodes, requests), self._usual.copy()
        self.new, self.searches, self.trust = True, 0, trust
        self.debt = self.forgone = 0.0  # seconds that trials and comparisons have lost, less what they may
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

    def gained(self, foreseen: float, seconds: float, plain: float, iterations: int) -> None:
        """So many have taken ``seconds`` for what plain decoding takes ``plain`` for: ``foreseen`` times as long."""
        share = plain / (seconds * foreseen)
        self.trust += iterations / (iterations + _TELLING) * (min(share, _TRUSTED) - self.trust)

    def owe(self, trials: float, comparisons: float) -> None:
        self.debt = min(max(self.debt + trials, 0.0), _LOST * _LONGEST_REST)
        self.forgone = min(max(self.forgone + comparisons, 0.0), _LOST * _LONGEST_REST)

    def best(self, requests: int, context: int, costs: Costs, host: float) -> tuple[int, float]:
        """The size that would have brought most tokens a second, and how many times plain decoding's that is,
        whatever the trust."""
        sizes, nodes = self.sizes, np.maximum(self.sizes - requests, 0)
        target = costs.target.base(int(sizes[-1]))[sizes] + costs.target.per_context * context
        seconds = target + costs.target.per_node * nodes * context / requests + self.drafting + host
        rate = np.where(nodes > 0, (requests + self.brought) / seconds, 0.0)
        plain = requests / (costs.plain(requests, context) + host)
        return int(sizes[rate.argmax()]), float(rate.max() / plain)


class Sizes:
    """``held``: the tokens of each verification for now, 0 where plain decoding is better."""

    def __init__(self) -> None:
        self.held, self._left, self._load = 0, 0, -1
        self._tries, self._compares = False, False  # whether what is held is a trial, or plain decoding to compare
        self._gain = 1.0  # times plain decoding, what is held is to be worth, or would be where that is compared
        self._seconds, self._plain, self._counted = 0.0, 0.0, 0  # that iterations took, and would have plainly
        self._settling, self._searching = 0, 0  # iterations until they count; those since plain decoding
        self._known: dict[int, _Known] = {}

    def nodes(self, requests: int, context: int, costs: Costs, host: float, foreseen: Foreseen) -> int | None:
        """How many nodes beside the roots of so many ``requests`` are verified; None: as many as pay.

        ``context``: cached tokens of all. ``host``: seconds of an iteration beside its passes. ``foreseen`` counts
        where nothing else is known.
        """
        if costs.change <= 0 or requests == 0:
            return None
        self._left -= 1
        self._searching = self._searching + 1 if self.held else 0
        load = load_of(requests)
        if load not in self._known:
            nearest = min(self._known, key=lambda other: abs(other - load), default=None)
            trust = 1.0 if nearest is None else self._known[nearest].trust
            self._known[load] = _Known(requests, costs, foreseen, trust)
        if self._left < 0 or abs(load - self._load) > 1:
            self._choose(load, requests, context, costs, host)
        return max(self.held - requests, 0)

    def _choose(self, load: int, requests: int, context: int, costs: Costs, host: float) -> None:
        known = self._known[load]
        best, gain = known.best(requests, context, costs, host)
        stays = abs(load - self._load) <= 1
        if stays and self.held and self._counted:
            known.gained(self._gain, self._seconds, self._plain, self._counted)
        pays = gain * known.trust > (_SURE if known.new else 1.0)
        compares = stays and pays and self._searching >= _FIRST and known.forgone <= 0
        # After plain decoding what is known may be so no longer, and is tried, whatever it says.
        rested = stays and self.held == 0 and not (known.new or self._compares)
        looks = rested and known.debt <= 0
        gives_up = stays and self.held > 0 and not (pays or self._tries)  # it may have been the machine: a short rest
        self.held = best if looks or (pays and not rested and not compares) else 0
        self._tries, known.new = looks or (known.new and pays), False
        self._compares, self._gain = compares, gain
        self._seconds, self._plain, self._counted, self._settling = 0.0, 0.0, 0, _SETTLING
        left = _COMPARING if compares else _LOOKING if looks else _FIRST if self._tries or gives_up else HELD
        self._load, self._left = load, left - 1

    def spent(self, seconds: float, plain: float) -> None:
        """An iteration took ``seconds``; its tokens would have taken plain decoding ``plain`` seconds."""
        if known := self._known.get(self._load):
            self._settling -= 1
            if self._settling < 0:
                self._seconds, self._plain = self._seconds + seconds, self._plain + plain
                self._counted += 1
            lost = seconds - plain if self.held and self._tries else 0.0
            forgone = (self._gain * known.trust - 1) * seconds if self._compares else 0.0
            known.owe(lost - _LOST * seconds, forgone - _LOST * seconds)

    def observe(self, probability: np.ndarray, requests: int, drafting: float | None) -> None:
        """A search has found candidates of ``probability`` [n], roots apart, and taken ``drafting`` seconds for it;
        None if that says nothing of the next one."""
        known = self._known.get(load_of(requests)) if requests else None
        if known and self.held > requests:
            known.learn(probability, requests, drafting, self.held)


def load_of(requests: int) -> int:
    """Numbers of ``requests`` that what is learnt of one holds for: a step is a factor of 1.4."""
    return round(2 * math.log2(requests))
