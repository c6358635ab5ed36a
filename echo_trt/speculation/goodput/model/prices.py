"""Shadow prices of latency targets: what a token is worth beyond itself to a request that is behind its target.

The planner maximises tokens subject to every target: a request that wants y tokens per second must get y T of them in T
seconds. With a price m per token of such a request, the Lagrangian is the sum of (1 + m) tokens less (price of time +
sum of m y) seconds. Prices follow by dual ascent: what a request lacks of y T adds up to the tokens that it is behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.pacer import Pace


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
