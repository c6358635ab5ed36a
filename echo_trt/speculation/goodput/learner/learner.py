"""The learner: what came of an iteration corrects costs, acceptance and what is known of requests."""

from __future__ import annotations

import numpy as np

from echo_trt.speculation.goodput.learner.costs import CostLearner
from echo_trt.speculation.goodput.learner.requests import History
from echo_trt.speculation.goodput.learner.sources import SourceLearner
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.model.iteration import IterationModel
from echo_trt.speculation.goodput.settings import GoodputSettings, GoodputTuning
from echo_trt.speculation.planner import Iteration, StepContext


class Learner:
    """Owns what changes: ``costs`` and ``acceptance`` are corrected in place, ``history`` is its own."""

    def __init__(self, costs: Costs, acceptance: Acceptance, slots: int, tuning: GoodputTuning, block: int):
        self.costs, self.acceptance, self._block = costs, acceptance, block
        self.history, self.sources = History(slots, tuning), SourceLearner(acceptance, tuning)
        self._cost_learner = CostLearner(costs, tuning)
        self._epoch = np.full(slots, -1)
        self.usual_price = 0.0  # of requests with latency targets, running mean

    def model(self, load: StepContext, settings: GoodputSettings) -> IterationModel:
        """Return the model of an iteration of ``load``."""
        history = self.history
        seconds = history.host_seconds, history.level_seconds
        known = self.costs, self.acceptance, settings, load, self._block
        return IterationModel(*known, *seconds, history.speedup, self.usual_price)

    def forget_departed(self, load: StepContext) -> None:
        """Start afresh where another request has taken a slot."""
        for slot in load.slots[self._epoch[load.slots] != load.epoch].tolist():
            self.history.forget(slot)
        self._epoch[load.slots] = load.epoch

    def observe(self, iteration: Iteration, settings: GoodputSettings) -> float | None:
        """Learn from an iteration. Returns the tokens that it was worth, weighed by the prices of targets, or None
        where it computed prompts.

        Its accepted tokens are too few to count, so the worth is what was expected of its nodes.
        """
        plan, load, history, count = iteration.plan, iteration.load, self.history, len(iteration.load.slots)
        self._cost_learner.observe_drafts(iteration.drafts)
        history.decided(min(iteration.levels, 1) if self._block else iteration.levels, iteration.planning)
        self._cost_learner.observe_target(iteration.target, load.prompt_tokens)
        tree = plan.tree
        drafted, accepted = np.flatnonzero(tree.parent >= 0), np.zeros(len(tree))
        accepted[iteration.path] = 1
        columns = tree.source, tree.depth, tree.score, plan.probability, accepted
        self.sources.observe(*(column[drafted] for column in columns))
        self.sources.elapsed(iteration.seconds)
        history.observe(load.slots, np.bincount(tree.request[iteration.path], minlength=count), iteration.seconds)
        if (found := self.model(load, settings).prices) is not None:
            self.usual_price += (1 - settings.tuning.memory) * (found.usual - self.usual_price)
        if load.prompt_tokens or not count:
            return None
        tokens, model = float(plan.probability.sum()), self.model(load, settings)
        history.spent(tokens, model.plain_rate * iteration.seconds, iteration.host)
        if model.prices is None:
            return tokens
        weights = model.prices.weights / model.prices.mean  # plain decoding is worth a token per request at any price
        return float(plan.probability @ weights[tree.request])
