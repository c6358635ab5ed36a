"""Which shape drafts have for the next iterations: none, a chain of a fixed length, or what a search finds each time.

A search over nodes (``goodput``) finds more tokens, but takes time itself, and passes of many sizes take more than
passes of one. Where drafting pays little, a short chain for every request can be ahead. Which is, is measured: shapes
are tried for some iterations each, those first of which the cost tables promise most, and each as often as what is
known of it is uncertain (an upper confidence bound; Lai and Robbins, 1985).
"""

from __future__ import annotations

import math

import numpy as np

from echo_trt.decoding.acceptance import Acceptance
from echo_trt.decoding.costs import Costs
from echo_trt.decoding.sizes import load_of

SEARCH, PLAIN = -1, 0  # shapes; those above are the lengths of chains
LONGEST = 3  # tokens of a chain: beyond, a search has more to choose from
NAMES = ("plain", *(f"chain {length}" for length in range(1, LONGEST + 1)), "search")
LASTS = 24  # iterations for which a shape is kept
_SEARCH_LASTS = 72  # the same of the search, which has to find its sizes first
_RICH = 1.5  # times plain decoding: a promise of the search from which on it is kept
_NONE = 1e-9  # the rate of a shape that cannot be had
_SETTLING, _SEARCH_SETTLING = 2, 16  # iterations of another shape that say nothing: drafts catch up, sizes change
_DOUBT, _PLAIN_DOUBT = 0.06, 0.02  # standard deviation of log(measured / promised rate) of what has not been tried
_EVEN, _FINDS, _LIMITS = 1.12, 0.6, (0.95, 1.1)  # a search is worth chains, of what plain decoding is, times so much
_NOISE = 0.05  # standard deviation of what a trial measures of it
_OUTLIER = 0.15  # of that, beyond what was known: more is believed only if it is seen again
_AGEING = 0.004  # what is known becomes less certain by this a trial of others
_LEARNING, _HOPE = 0.03, 0.001  # how fast acceptance is learnt from drafts, and hoped for again while there are none


class Shapes:
    """What is known of each shape, by load. ``shape`` is the one in force, ``share`` what acceptance there is of that
    which was calibrated, for one level."""

    def __init__(self, acceptance: Acceptance):
        self._levels = acceptance.children.mean(axis=2)[:, 0]  # P(the best child is accepted), by depth
        self.share = 1.0
        self.shape, self._left, self._settling, self._drafted = SEARCH, 0, 0, 0
        self._asked = 0, 0, 0.0, 0  # requests, context, host, longest when this trial began
        self._tokens, self._seconds, self._measured = 0.0, 0.0, 0  # of this trial, over so many iterations
        self._first, self._firsts = 0.0, 0  # sum of what this trial's first tokens were worth, of what is usual
        self._known: dict[int, np.ndarray] = {}  # load -> [2, shapes]: mean and variance of log(measured / promised)
        self._iterations = np.zeros(len(NAMES), np.int64)

    def totals(self) -> dict[str, int]:
        """Iterations in each shape so far, by ``NAMES``."""
        return dict(zip(NAMES, self._iterations.tolist(), strict=True))

    def choose(self, requests: int, context: int, costs: Costs, host: float, longest: int) -> int:
        """The shape of this iteration over so many ``requests`` with ``context`` cached tokens in all.

        host: seconds of an iteration beside its passes. Chains are of ``longest`` tokens at most.
        """
        self._left -= 1
        begun = self._asked[0]
        if self._left < 0 or not 0.6 * begun < requests < 1.7 * begun:
            self._try_another(requests, context, costs, host, longest)
        self._iterations[self.shape] += 1
        return self.shape

    def _try_another(self, requests: int, context: int, costs: Costs, host: float, longest: int) -> None:
        self._conclude(costs)
        self._asked = requests, context, host, longest
        promised = self._promised(costs, self.share)
        mean, variance = self._of(requests)
        bound = np.log(promised) + mean + np.sqrt(variance)
        rich = promised[SEARCH] > _RICH * promised[PLAIN]
        chosen = LONGEST + 1 if rich else int(bound.argmax())
        shape = SEARCH if chosen == LONGEST + 1 else chosen
        searches = shape == SEARCH
        self._settling = 0 if shape == self.shape else _SEARCH_SETTLING if searches else _SETTLING
        self.shape, self._left = shape, (_SEARCH_LASTS if searches else LASTS) - 1
        self._tokens, self._seconds, self._measured = 0.0, 0.0, 0
        self._first, self._firsts = 0.0, 0

    def observe(self, requests: int, expected: float, seconds: float) -> None:
        """An iteration without prompts took ``seconds`` and is ``expected`` to have committed so many tokens."""
        if requests == 0:
            return
        if expected <= requests:
            self.share += _HOPE * max(1 - self.share, 0.0)
        self._settling -= 1
        if self._settling < 0 and requests == self._asked[0]:
            self._tokens += expected
            self._seconds += seconds
            self._measured += 1

    def drafted(self, best: float) -> None:
        """Requests were drafted for, whose best first tokens are worth ``best``, mean P(accept)."""
        seen = min(best / max(self._levels[0], 1e-3), 1.5)
        self._first, self._firsts = self._first + seen, self._firsts + 1
        self._drafted += 1
        step = max(_LEARNING, 1 / (self._drafted + 3))
        self.share = max(self.share + step * (seen - self.share), 0.05)

    def _conclude(self, costs: Costs) -> None:
        """A trial is over: what it measured is weighed with what was known.

        It is compared with what would have been promised for the texts that it met: some are easier than others.
        """
        if self._tokens == 0:
            return
        mean, variance = self._of(self._asked[0])
        np.minimum(variance + _AGEING**2, _DOUBT**2, out=variance)
        gain = variance[self.shape] / (variance[self.shape] + _NOISE**2 * LASTS / self._measured)
        rate = self._tokens / self._seconds
        met = self._first / self._firsts if self._firsts else self.share
        surprise = math.log(rate / self._promised(costs, met)[self.shape]) - mean[self.shape]
        mean[self.shape] += gain * min(max(surprise, -_OUTLIER), _OUTLIER)
        if abs(surprise) < _OUTLIER:  # else something disturbed it, or what was known is wrong: it is tried again
            variance[self.shape] *= 1 - gain

    def _of(self, requests: int) -> np.ndarray:
        """[2, shapes] of loads like this one, the search last; a new one is taken to be like the nearest."""
        load = load_of(requests)
        if load not in self._known:
            nearest = min(self._known, key=lambda known: abs(known - load), default=None)
            doubt = np.full(len(NAMES), _DOUBT**2)
            doubt[PLAIN] = _PLAIN_DOUBT**2
            mean = np.zeros(len(NAMES)) if nearest is None else self._known[nearest][0]
            self._known[load] = np.stack((mean, doubt))
        return self._known[load]

    def _brought(self, share: float) -> np.ndarray:
        """Tokens that chains of 0, 1, ... are expected to bring, a request."""
        levels = np.minimum(self._levels * share, 1.0)
        return np.concatenate(([0.0], np.cumsum(np.cumprod(levels))))

    def _promised(self, costs: Costs, share: float) -> np.ndarray:
        """Tokens a second by the tables, [shapes]. The search takes time, and finds the more the more there is: where
        the best chain promises little it is worth a bit less than that, elsewhere more."""
        requests, context, host, longest = self._asked
        brought = self._brought(share)
        length = np.arange(len(brought))
        verification = costs.sizes(requests, requests * length)
        seconds = costs.target.base(int(verification.max()))[verification] + costs.target.per_context * context
        seconds = seconds + costs.target.per_node * length * context + host
        entries = np.minimum((requests * (1 + brought)).astype(np.int64), requests * (1 + length))
        draft = costs.draft.base(int(entries.max()))
        first = costs.cold + draft[entries] + (length - 1) * draft[requests]
        seconds = seconds + np.where(length > 0, first + length * costs.draft.per_context * context, 0.0)
        rates = np.full(len(NAMES), _NONE)
        of_length = np.where(length <= longest, requests * (1 + brought) / seconds, _NONE)
        rates[: min(len(length), LONGEST + 1)] = of_length[: LONGEST + 1]
        best = of_length.max()
        rates[SEARCH] = best * min(max((best / rates[PLAIN] / _EVEN) ** _FINDS, _LIMITS[0]), _LIMITS[1])
        return rates
