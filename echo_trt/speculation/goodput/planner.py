"""The goodput policy: over the whole batch, draft levels and nodes that commit most tokens per second.

Two optimisers of one quantity, tokens per second, stand here on purpose. The optimiser (``optimiser``) searches levels
and nodes by a model of costs and acceptance: it decides anew in each iteration, and sees what each node is worth, but
it is as good as its model. The ladder (``ladder``) knows no model: it compares measured rates of a few verification
sizes with plain decoding's, slowly, and is right in the end whatever the model is wrong by. So the model is trusted
only within what a measurement has confirmed: the ladder says how many tokens may be verified, or that none are drafted,
and the optimiser fills that size.

Time has a price: the tokens per second that this machine commits anyway (``IterationModel.time_price``). A plan is
worth its expected tokens less the price of its passes; plain decoding is the plan without a draft. An iteration decides

1. how many tokens are verified at most, or that it decodes plainly: the size that the ladder holds for the load.
2. before a draft level: which nodes of the frontier are expanded, if any (``LevelSearch``). A block drafter's pass is
   weighed once, with all its levels; its trees are then grown best first, at no cost (``Candidates.promising``).
3. after the last level: how many of all candidates are verified, best first over the batch (``select``). Where a pass
   of another size than the last one costs extra (OpenVINO) the size is filled, elsewhere as many as pay are taken.
   Beyond the ladder's size go tokens that pay, where a source has sure ones (``ChainSource.forces``): the ladder
   compares what a draft brings, and these bring the same beside any draft.
"""

from __future__ import annotations

import io
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from echo_trt.speculation.bill import PlainClock
from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.goodput.ladder import UNDRAFTED, Ladder, load_of
from echo_trt.speculation.goodput.learner.learner import Learner
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.model.iteration import TOKENS_PER_REQUEST, Admission, IterationModel
from echo_trt.speculation.goodput.optimiser.candidates import Candidates
from echo_trt.speculation.goodput.optimiser.levels import LevelSearch
from echo_trt.speculation.goodput.optimiser.nodes import paying_nodes, select
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.pacer import Seats
from echo_trt.speculation.pack import LevelShape
from echo_trt.speculation.planner import ChainSource, Explanation, Iteration, PlainCost, Plan, StepContext
from echo_trt.speculation.super_tree import SuperTree

ABOVE_PLAIN = 1e-12  # log gain that always begins above plain decoding, since the search may choose no draft
LOW_PRICE = 0.1  # mean price of latency targets up to which the ordinary ladder is used; larger: fewer changes of size


class GoodputPlanner:
    """Maximise committed tokens per second, with what was learnt while running."""

    def __init__(
        self,
        name: str,
        settings: GoodputSettings,
        costs: Costs,
        acceptance: Acceptance,
        slots: int,
        sources: Sequence[ChainSource] = (),
        head: bool = True,
        budget: int = 0,
        block: int = 0,
        chain_alone: bool = False,
    ):
        """Begin with measured ``costs`` and a calibrated ``acceptance``, for at most ``slots`` requests at a time.

        sources      what proposes chains at no cost, beside the draft
        head         whether the draft is a network, whose passes cost time; else it is not asked
        budget       knee of the measured costs, which is only reported
        block        rows that a block drafter's only pass computes for a request; 0: the draft takes one pass per level
        chain_alone  draft a chain for a request that runs alone, since the target rounds trees differently from chains
        """
        self.name, self.settings, self.budget = name, settings, budget
        self._alone = settings.as_chain() if chain_alone else settings
        self.sources, self._head = sources, head
        self.costs, self.acceptance = costs, acceptance  # which the learner corrects in place
        self.learner = Learner(costs, acceptance, slots, settings.tuning, block)
        self.ladder = Ladder(settings.tuning, acceptance.calibrated)
        tuning, target = settings.tuning, costs.target
        curve = target.sizes.tolist(), target.seconds.tolist(), target.per_context, target.per_node
        self._measured = replace(costs, target=Curve(*curve))
        self._plain_clock = PlainClock(
            tuning.forecast_error,
            tuning.comparison_weight,
            tuning.memory,
            tuning.warm_up,
            tuning.trial_iterations - tuning.warm_up,
        )

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        self.learner.forget_departed(load)
        model = self.learner.model(load, self._alone if len(roots) == 1 else self.settings)
        settings, count = model.settings, len(roots)
        forced = any(source.forces(load) for source in self.sources)
        size, may_draft = self._size(model, forced)
        if size == UNDRAFTED:
            return Plan.undrafted(roots)
        largest = max(size, model.largest) if forced and not model.for_prompts else size
        fills = may_draft and self._fills_size
        weights, time_price = self._weights(model)
        candidates = Candidates(
            SuperTree.from_roots(roots),
            self.acceptance,
            weights=weights,
            max_draft_len=load.max_draft_len,
            proposals=[source.propose(load) for source in self.sources],
            one_path=settings.one_path,
            continue_leaves=lambda tree, chances: [source.extend(tree, chances, load) for source in self.sources],
        )
        filled = size - count if fills else 0
        search = LevelSearch(model, candidates, model.verifying(size - count, filled), time_price)
        if may_draft and self._head and load.max_draft_len.any():
            self._draft(draft, search)
        candidates.append_continuations()
        seconds = model.verifying(largest - count, filled)
        chosen = select(candidates.value, candidates.tree, settings.per_request, seconds, time_price)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        padded_to = model.costs.padding_target(len(tree), size) if fills else 0
        chances = candidates.probability
        return Plan(tree, chances[nodes], Explanation(candidates.tree, chances, nodes, size), padded_to)

    def _size(self, model: IterationModel, forced: bool) -> tuple[int, bool]:
        """Return the tokens to verify at most, or UNDRAFTED, and whether the draft may be asked for candidates.

        ``forced``: whether a source has tokens that are worth it even so.
        """
        costs, count = model.costs, model.requests
        if model.for_prompts:  # what is free may pay even so; the ladder's sizes are those of other passes
            return costs.padded(TOKENS_PER_REQUEST * count), False
        priced = model.prices is not None and model.usual_price > LOW_PRICE
        size = self.ladder.size(count, lambda: self._forecast(model), priced)
        if size != UNDRAFTED:
            return max(size, costs.padded(count + 1)), True
        return costs.padded(TOKENS_PER_REQUEST * count) if forced else UNDRAFTED, False

    def _weights(self, model: IterationModel) -> tuple[np.ndarray, float]:
        """Return what a request's token is worth, float64 [B], and the price of time in the same unit."""
        weights, time_price = self.learner.history.weights(model.load.slots), model.time_price
        if model.prices is None:
            return weights, time_price
        weights = weights * model.prices.weights
        scale = weights.max()  # the search expects no token to be worth more than 1
        return weights / scale, time_price / scale

    def admit(self, seats: Seats) -> Seats:
        history = self.learner.history
        second = history.speedup, history.host_seconds, self.learner.usual_price
        return Admission(self.costs, self.settings.tuning, *second).admit(seats)

    def level_shapes(self, requests: int) -> list[LevelShape]:
        settings = self._alone if requests == 1 else self.settings
        beams = min(settings.level_beams(requests), settings.width)
        return [LevelShape(1, levels, beams, settings.width) for levels in range(1, settings.max_depth)]

    def plain_cost(self, iteration: Iteration) -> PlainCost:
        load, costs, host = iteration.load, self.costs, self.learner.history.host_seconds
        count, prompts, target = len(load.slots), load.prompt_tokens, iteration.target
        factor, error = self._plain_clock.factor(load_of(max(count, 1)))
        each = factor * self._measured.plain(count, load.context)
        if not prompts:
            return PlainCost(each, each, error)
        # The curve is of verifications, and prompts take less: what they took is known, but for the drafted tokens.
        share = costs.target(count + prompts, load.context) / costs.target(target.tokens, load.context)
        return PlainCost(min(share, 1.0) * target.seconds + host, each, error)

    def observe(self, iteration: Iteration) -> None:
        load, count, done = iteration.load, len(iteration.load.slots), iteration.target
        if count and not load.prompt_tokens:
            if len(iteration.plan.tree) > count:
                expected = self._measured.target(done.tokens, done.context, done.node_context)
                self._plain_clock.verified(load_of(count), done.seconds / expected)
            elif not iteration.drafts:
                expected = self._measured.plain(count, load.context)
                self._plain_clock.decoded(load_of(count), iteration.seconds / expected)
        tokens = self.learner.observe(iteration, self.settings)
        if tokens is not None:
            self.ladder.observe(tokens, iteration.seconds)
        for source in self.sources:
            source.observe(iteration.load)

    def dump(self) -> bytes:
        file, of_texts = io.BytesIO(), [source.dump() for source in self.sources]
        learnt: Mapping[str, Any] = ChainMap(self.learner.dump(), *of_texts)
        np.savez(file, **learnt)
        return file.getvalue()

    def load(self, learnt: bytes) -> None:
        with np.load(io.BytesIO(learnt)) as found:
            self.learner.load(found)
            for source in self.sources:
                source.load(found)

    def totals(self) -> dict[str, dict[str, float]]:
        return self.learner.sources.totals()

    def gain(self) -> float | None:
        return self.ladder.gain

    @property
    def _fills_size(self) -> bool:
        """Whether verifications are filled to their size: a change of size costs time here, and a draft fills it."""
        return self._head and self.costs.change > 0

    def _forecast(self, model: IterationModel) -> tuple[np.ndarray, np.ndarray]:
        """Return the ladder's sizes int64 [R] and forecasts of their log gains float64 [R]."""
        sizes = model.verification_sizes()
        if not self._head:
            return sizes[-1:], np.full(1, ABOVE_PLAIN)
        log_gains = model.log_gains(sizes)
        if self._fills_size:
            return sizes, log_gains - model.settings.tuning.forecast_error
        # The search may choose any size up to the last one, or none.
        return sizes[-1:], np.maximum(log_gains.max(keepdims=True), ABOVE_PLAIN)

    def _draft(self, draft: Draft, search: LevelSearch) -> None:
        """Draft levels, while they pay; their nodes join the candidates."""
        candidates, model, load = search.candidates, search.model, search.model.load
        settings = model.settings
        requests, levels = search.requests_to_draft(draft.looks_ahead)
        if len(requests) == 0:  # no draft pays
            requests = self._explore(model)
        self.learner.history.drafted(load.slots, load.slots[requests])
        if len(requests) == 0:
            return
        if levels:
            maximum = min(settings.per_request, max(16, 4 * len(search.verification) // len(requests)))
            draft.look_ahead(1 + levels, settings.level_beams(len(requests)), settings.width, maximum)
        log_q, tokens = draft.expand_roots(requests)
        candidates.add(requests, log_q, tokens, settings.width)
        if model.block or levels:
            depth = settings.max_depth if model.block else 1 + levels
            self._read_levels(draft, search, depth, settings.level_beams(len(requests)))
        else:
            self._draft_levels(draft, search)

    def _explore(self, model: IterationModel) -> np.ndarray:
        """Return the request to draft for although it does not pay, if its time has come: int64 [0 or 1]."""
        load, costs = model.load, model.costs
        open_ = np.flatnonzero(load.max_draft_len > 0)
        entries = load.draft_lag[open_] + model.block
        alone = costs.cold + costs.draft.per_context * load.context / len(load.slots)
        seconds = costs.draft.base(int(entries.max()))[entries] + alone
        return self.learner.history.explore(open_, load.slots, seconds)

    def _draft_levels(self, draft: Draft, search: LevelSearch) -> None:
        """Draft further levels, a pass each, while the next one pays."""
        candidates, settings, expanded = search.candidates, search.model.settings, 0
        for depth in range(1, settings.max_depth):
            frontier = candidates.frontier(depth, settings.beams)
            if len(frontier) == 0:
                return
            # A pass computes the nodes above again: about in proportion to the share of the frontier.
            entries = np.arange(1, len(frontier) + 1) * (1 + expanded / len(frontier))
            count = search.worth_expanding(candidates.value[frontier], depth, entries)
            if count == 0:
                return
            nodes = np.sort(frontier[:count])
            log_q, tokens = draft.expand(candidates.tree, nodes)
            candidates.add(nodes, log_q, tokens, settings.width)
            expanded += count

    def _read_levels(self, draft: Draft, search: LevelSearch, drafted: int, beams: int) -> None:
        """Grow trees to depth ``drafted`` by levels that were drafted at once: a device's ``beams``, a block's best."""
        candidates, settings = search.candidates, search.model.settings
        for depth in range(1, drafted):
            if search.model.block:
                value = candidates.value[candidates.tree.num_requests :]
                paying = paying_nodes(value, search.verification, search.time_price)
                # Expand a few nodes more than pay now, because costs have steps.
                nodes = candidates.promising(depth, min(int(1.25 * paying) + 1, len(search.verification) - 1))
            else:
                nodes = np.sort(candidates.frontier(depth, beams))
            if len(nodes) == 0:
                return
            log_q, tokens = draft.expand(candidates.tree, nodes)
            candidates.add(nodes, log_q, tokens, settings.width)
