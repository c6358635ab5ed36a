"""The model of one iteration: what its passes cost, what a second is worth, and the prices of latency targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from echo_trt.speculation.goodput.model.acceptance import Acceptance, Forecast
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.settings import GoodputSettings, GoodputTuning
from echo_trt.speculation.pacer import Pace, Seats
from echo_trt.speculation.planner import StepContext

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

    usual  recent mean price; a request begins with a share of it, or each would have to fall behind first
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


TOKENS_PER_REQUEST = 8  # the largest verification size that is tried has as many tokens per request, and 64 more


@dataclass(frozen=True)
class IterationModel:
    """Costs and acceptance for the load of one iteration.

    block          rows that a block drafter's only pass computes for a request; 0: the draft takes one pass per level
    host_seconds   of an iteration, beside passes and planning
    level_seconds  of planning a draft level
    usual_price    recent mean price of requests with latency targets
    speedup        recently committed tokens, divided by plain decoding's in the same time
    """

    costs: Costs
    acceptance: Acceptance
    settings: GoodputSettings
    load: StepContext
    block: int
    host_seconds: float
    level_seconds: float
    speedup: float
    usual_price: float = 0.0

    @property
    def requests(self) -> int:
        return len(self.load.slots)

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding."""
        return self.requests / (self.costs.plain(self.requests, self.load.context) + self.host_seconds)

    @property
    def time_price(self) -> float:
        """The tokens that a second is worth: plain decoding's rate, times what speculation has gained."""
        price = self.speedup * self.plain_rate
        return price if self.prices is None else price + self.prices.time

    @property
    def for_prompts(self) -> bool:
        """Say whether the pass chiefly computes prompts. Then a token costs its full price, and drafts are dear."""
        target, prompt_tokens, limit = self.costs.target, self.load.prompt_tokens, self.settings.tuning.prompts_share
        return prompt_tokens > 0 and target(self.requests + prompt_tokens) > limit * target(self.requests)

    @cached_property
    def prices(self) -> Prices | None:
        return prices(self.load.pace, self.settings.tuning, self.usual_price)

    def forecast(self, levels: int) -> Forecast:
        return self.acceptance.forecast(self.settings.width, levels)

    @property
    def largest(self) -> int:
        """The tokens up to which verifications are tried."""
        return TOKENS_PER_REQUEST * self.requests + 64

    def verification_sizes(self) -> np.ndarray:
        """Return the verification sizes that are worth telling apart: int64 [R], ascending."""
        return self.costs.verification_sizes(self.requests, self.largest, self.settings.tuning.size_ratio)

    def log_gains(self, sizes: np.ndarray) -> np.ndarray:
        """Forecast the log gains over plain decoding of verification ``sizes`` int64 [R]: float64 [R]."""
        costs, load, count, settings = self.costs, self.load, self.requests, self.settings
        nodes = (sizes - count) / count  # of a request
        levels = settings.tuning.levels_per_doubling * np.log2(1 + nodes)
        levels = np.minimum(np.minimum(levels, nodes), settings.max_depth)
        passes = np.minimum(levels, 1) if self.block else levels
        level = costs.draft((2 + self.block) * count, load.context) + self.level_seconds
        target = costs.target.base(int(sizes[-1]))[sizes] + costs.target.per_context * load.context
        seconds = target + costs.target.per_node * nodes * load.context + costs.cold + passes * level
        tokens = 1 + self.forecast(settings.tuning.horizon).expected_tokens(sizes - count, count) / count
        plain = costs.plain(count, load.context) + self.host_seconds
        log_gains: np.ndarray = np.log(tokens * plain / (seconds + self.host_seconds))
        return log_gains

    def verifying(self, nodes: int, filled: int = 0) -> np.ndarray:
        """Return the additional seconds of verifying 0, 1, ... ``nodes`` nodes: float64 [nodes + 1].

        ``filled``: so many are verified whatever they are worth.
        """
        costs, load, number = self.costs, self.load, np.arange(nodes + 1)
        seconds: np.ndarray = costs.verifications(self.requests + load.prompt_tokens, number)
        seconds += costs.target.per_node * load.context / self.requests * number
        seconds = seconds - seconds[filled] + 2 * costs.change  # there and back
        seconds[: filled + 1] = 0.0
        return seconds

    def draft_passes(self, entries: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the seconds of a draft pass of ``entries`` float64 [F] for each of the expansion sizes ``ends``."""
        draft = self.costs.draft
        base = draft.base(int(entries[-1]) + 1)[entries[ends - 1].astype(np.int64)]
        context = draft.per_context * self.load.context * np.minimum(ends / self.requests, 1.0)
        seconds: np.ndarray = base + context
        return seconds
