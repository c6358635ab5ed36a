"""The learner: what came of an iteration corrects costs, acceptance and what is known of requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from echo_trt.speculation.goodput.learner.costs import CostLearner
from echo_trt.speculation.goodput.learner.sources import SourceLearner
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.model.iteration import IterationModel
from echo_trt.speculation.goodput.settings import GoodputSettings, GoodputTuning
from echo_trt.speculation.planner import Iteration, StepContext


class History:
    """Running statistics of the requests, by slot."""

    def __init__(self, slots: int, tuning: GoodputTuning):
        self._tuning, self._newest = tuning, 1 - tuning.memory  # the newest iteration's weight in running means
        self._progress = np.ones(slots)  # tokens per iteration, running mean [S]
        self._idle = np.zeros(slots, np.int64)  # iterations since a slot was last drafted for [S]
        self._credit = 0.0  # seconds that a draft may take to explore
        self._tokens = self._plain = 1e-9  # fading sums of expected tokens, and of plain decoding's in the same time
        self.host_seconds = self.level_seconds = 0.0  # of an iteration beside passes and plan; of planning a level

    @property
    def speedup(self) -> float:
        """Expected tokens divided by those of plain decoding in the same time, running mean; 1 or more."""
        return max(self._tokens / self._plain, 1.0)

    def forget(self, slot: int) -> None:
        """Begin another request in ``slot``."""
        self._progress[slot], self._idle[slot] = self._progress.mean(), 0

    def weights(self, slots: np.ndarray) -> np.ndarray:
        """Return the weights of nodes, above 1 for requests that have progressed less than the others: float64 [B]."""
        progress = self._progress[slots]
        if len(slots) < 2:
            return np.ones(len(slots))
        weights: np.ndarray = np.clip((progress.mean() / progress) ** self._tuning.fairness, 0.8, 1.25)
        return weights

    def drafted(self, slots: np.ndarray, chosen: np.ndarray) -> None:
        """Record an iteration that could draft for ``slots`` int64 [B], and did for ``chosen`` int64 [A]."""
        self._idle[slots] += 1
        self._idle[chosen] = 0

    def explore(self, requests: np.ndarray, slots: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Return the request whose last draft is longest ago, among requests whose draft fits the time credit.

        requests, slots int64 [A]; seconds float64 [A], of a draft. Returns int64 [0 or 1].
        """
        requests = requests[seconds <= self._credit]
        if len(requests) == 0:
            return requests
        self._credit = 0.0
        longest = self._idle[slots[requests]].argmax()
        return requests[longest : longest + 1]

    def decided(self, levels: int, seconds: float) -> None:
        """Update the time to plan a level, after ``levels`` draft levels and ``seconds`` beside their passes."""
        if levels:
            self.level_seconds += self._newest * (seconds / levels - self.level_seconds)

    def observe(self, slots: np.ndarray, progress: np.ndarray, seconds: float) -> None:
        """Update progress and the time credit, after ``seconds`` that committed ``progress`` int64 [B] tokens."""
        self._credit += self._tuning.exploration * seconds
        self._progress[slots] += self._newest * (progress - self._progress[slots])

    def spent(self, expected: float, plain: float, host: float) -> None:
        """Update the speedup and the host time after an iteration without prompts.

        expected: tokens. plain: tokens that plain decoding commits in that time. host: seconds outside passes and
        planning.
        """
        memory = self._tuning.memory
        self._tokens = memory * self._tokens + expected
        self._plain = memory * self._plain + plain
        self.host_seconds += self._newest * (host - self.host_seconds)


class Learner:
    """Owns what changes: ``costs`` and ``acceptance`` are corrected in place, ``history`` is its own."""

    def __init__(self, costs: Costs, acceptance: Acceptance, slots: int, tuning: GoodputTuning, block: int):
        self.costs, self.acceptance, self._block = costs, acceptance, block
        self.history, self.sources = History(slots, tuning), SourceLearner(acceptance, tuning)
        self._cost_learner = CostLearner(costs, tuning)
        self._epoch = np.full(slots, -1)
        self.usual_price = 0.0  # of requests with latency targets, running mean

    def dump(self) -> dict[str, np.ndarray]:
        """Return what was learnt of sources and of the machine, for ``load`` of a later process."""
        costs = self.costs
        curves = {"target": costs.target.correction, "draft": costs.draft.correction, "cold": np.array(costs.cold)}
        return curves | self.sources.dump()

    def load(self, learnt: Mapping[str, np.ndarray]) -> None:
        """Begin with what was dumped. Raises ValueError or KeyError where it is of other costs or sources."""
        self.costs.target.correct(learnt["target"])
        self.costs.draft.correct(learnt["draft"])
        self.costs.cold = float(learnt["cold"])
        self.sources.load(learnt)

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
