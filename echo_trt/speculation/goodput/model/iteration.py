"""The model of one iteration: what its passes cost, and what a second is worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from echo_trt.speculation.goodput.model.acceptance import Acceptance, Forecast
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.model.prices import Prices, prices
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import StepContext

TOKENS_PER_REQUEST = 8  # the largest verification size that is tried has as many tokens per request, and 64 more


@dataclass(frozen=True)
class IterationModel:
    """Costs and acceptance for the load of one iteration.

    block          rows that a block drafter's only pass computes for a request; 0: the draft takes one pass per level
    host_seconds   of an iteration, beside passes and planning
    level_seconds  of planning a draft level
    usual_price    mean price of late of requests with latency targets
    speedup        tokens committed lately, divided by those of plain decoding in the same time
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

    def verification_sizes(self) -> np.ndarray:
        """Return the verification sizes that are worth telling apart: int64 [R], ascending."""
        largest = TOKENS_PER_REQUEST * self.requests + 64
        return self.costs.verification_sizes(self.requests, largest, self.settings.tuning.size_ratio)

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

    def verifying(self, nodes: int, fills: bool) -> np.ndarray:
        """Return the additional seconds of verifying 0, 1, ... ``nodes`` nodes: float64 [nodes + 1].

        ``fills``: the size is filled, whatever its nodes are worth.
        """
        costs, load, number = self.costs, self.load, np.arange(nodes + 1)
        if fills:
            return np.zeros(nodes + 1)
        seconds: np.ndarray = costs.verifications(self.requests + load.prompt_tokens, number)
        seconds += costs.target.per_node * load.context / self.requests * number
        seconds[1:] += 2 * costs.change  # there and back
        seconds -= seconds[0]
        return seconds

    def draft_passes(self, entries: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the seconds of a draft pass of ``entries`` float64 [F] for each of the expansion sizes ``ends``."""
        draft = self.costs.draft
        base = draft.base(int(entries[-1]) + 1)[entries[ends - 1].astype(np.int64)]
        context = draft.per_context * self.load.context * np.minimum(ends / self.requests, 1.0)
        seconds: np.ndarray = base + context
        return seconds
