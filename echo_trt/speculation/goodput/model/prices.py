"""Shadow prices of latency targets: what a token is worth beyond itself to a request that is behind its target.

The planner maximises tokens subject to every target: a request that wants y tokens per second must get y T of them in T
seconds. With a price m per token of such a request, the Lagrangian is the sum of (1 + m) tokens less (price of time +
sum of m y) seconds. Prices follow by dual ascent: what a request lacks of y T adds up to the tokens that it is behind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.pacer import Pace, Seats

MIN_CHUNK, CHUNKS = 32, 8  # tokens of the smallest chunk beside late requests, and sizes tried; larger: dearer, finer


@dataclass(frozen=True)
class Prices:
    """Prices of one iteration's requests.

    weights  float64 [B], tokens that a request's token is worth, 1 or more
    time     tokens per second by which targets raise the price of time
    usual    mean price of those with a target
    """

    weights: np.ndarray
    time: float
    usual: float

    @property
    def mean(self) -> float:
        return float(self.weights.mean())


def prices(pace: Pace | None, tuning: GoodputTuning, usual: float = 0.0) -> Prices | None:
    """Return the prices of requests that keep ``pace``; None: no request has a target.

    usual  mean price of late, with which a request begins in part; else each would have to fall behind first
    """
    if pace is None:
        return None
    lag_price = tuning.lag_price * (pace.lag + tuning.lead)
    price = np.clip(tuning.carried_price * usual + lag_price, 0.0, tuning.max_price)
    price[pace.wanted == 0] = 0.0
    targeted = np.count_nonzero(pace.wanted)
    return Prices(1.0 + price, float(price @ pace.wanted), float(price.sum() / max(targeted, 1)))


@dataclass(frozen=True)
class Admission:
    """Weighs what sitting out and small chunks save. Numbers are as of ``IterationModel``."""

    costs: Costs
    tuning: GoodputTuning
    speedup: float
    host_seconds: float
    usual_price: float

    def admit(self, seats: Seats) -> Seats:
        """Return who is in the pass, and its chunk of prompts."""
        seats = self._seated(seats)
        return replace(seats, chunk=self._chunk(seats)) if len(seats.prompts) else seats

    def _seated(self, seats: Seats) -> Seats:
        """Let requests without a target sit out, where the time that this saves is worth more than a token of each.

        The request that has sat out the fewest passes in a row sits out first, and none more than ``max_sat_out``.
        """
        pace, context, count = seats.pace, int(seats.context.sum()), len(seats.decoding)
        usual, added = self._time_prices(seats)
        if pace is None or added == 0:
            return seats
        may = np.flatnonzero((pace.wanted == 0) & (pace.waited < self.tuning.max_sat_out))
        left = count - np.arange(len(may) + 1)  # of a pass without 0, 1, ... of them
        seconds = self.costs.target.base(count)[left] + self.costs.target.per_context * context * left / count
        seconds[1:] += 2 * self.costs.change  # to the smaller size and back
        out = int(((usual + added) * (seconds[0] - seconds) - np.arange(len(may) + 1)).argmax())
        seated = np.ones(count, bool)
        seated[may[np.argsort(pace.waited[may], kind="stable")[:out]]] = False
        return seats.of(seated)

    def _chunk(self, seats: Seats) -> int:
        """Return the chunk whose tokens are worth most, less the price of their time; without prices all of it.

        A prompt's token is worth the tokens that could be committed in the time that it adds to a pass, times
        ``prompt_worth``, and more, the more requests wait for their prompts beside those that decode.
        """
        count, maximum = len(seats.decoding), seats.chunk
        usual, added = self._time_prices(seats)
        if added == 0 or maximum < MIN_CHUNK:
            return maximum
        sizes = np.unique(np.linspace(MIN_CHUNK, maximum, CHUNKS).astype(np.int64))
        seconds = self.costs.target.base(count + maximum)[count + sizes]
        per_token = (seconds[-1] - seconds[0]) / max(maximum - MIN_CHUNK, 1)
        worth = self.tuning.prompt_worth * (1 + len(seats.prompts) / count) * usual * per_token
        return int(sizes[(worth * sizes - (usual + added) * seconds).argmax()])

    def _time_prices(self, seats: Seats) -> tuple[float, float]:
        """Return the tokens that a second is worth without targets, and how much more targets make of it."""
        found, count = prices(seats.pace, self.tuning, self.usual_price), len(seats.decoding)
        seconds = self.costs.plain(count, int(seats.context.sum())) + self.host_seconds
        return self.speedup * count / seconds, found.time if found else 0.0
