"""Cost curves follow the machine: each timed pass corrects sizes near its own, and by a share all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from echo_trt.speculation.drafts import Pass
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.settings import GoodputTuning


def correct(curve: Curve, done: Pass, tuning: GoodputTuning) -> None:
    """Correct ``curve`` by a pass; bounds of its error keep other work out of the curve.

    Sizes near the pass's are corrected with it, and all others by a share, since it may be the machine that has become
    slower.
    """
    base = max(done.seconds - curve.per_context * done.context - curve.per_node * done.node_context, 1e-6)
    error = min(max(math.log(base / curve.base(done.tokens)[done.tokens]), -1.0), 0.3)
    near = np.exp(-0.5 * (np.log(curve.sizes / done.tokens) / 0.2) ** 2)  # 1 of this size, 0 of quite another
    curve.correct(tuning.cost_weight * error * (near + tuning.shared_cost * (1 - near)))


class CostLearner:
    """Keeps ``costs`` true while they are used."""

    def __init__(self, costs: Costs, tuning: GoodputTuning):
        self._costs, self._tuning = costs, tuning
        self._size = 0  # of the target's last pass

    def observe_target(self, done: Pass, prompts: int) -> None:
        """Correct the target's curve by a pass, ``prompts`` of whose tokens are prompts'.

        Prompt tokens attend differently, and a change of size takes extra time: such passes do not correct the curve.
        """
        costs = self._costs
        size = costs.padded(done.tokens) if done.node_context else costs.padded_undrafted(done.tokens)
        changed, self._size = size != self._size, size
        if not prompts and not (changed and costs.change > 0):
            correct(costs.target, replace(done, tokens=size), self._tuning)

    def observe_drafts(self, passes: Sequence[Pass]) -> None:
        """Correct the draft's curve by an iteration's passes; those that were timed together share their seconds as the
        curve says.
        """
        begin = 0
        while begin < len(passes):
            group = passes[begin : begin + passes[begin].together]
            expected = [self._costs.draft(done.tokens, done.context) for done in group]
            expected[0] += 0.0 if begin else self._costs.cold
            scale = sum(done.seconds for done in group) / max(sum(expected), 1e-9)
            for number, (done, seconds) in enumerate(zip(group, expected, strict=True)):
                timed = done if len(group) == 1 else replace(done, seconds=scale * seconds)
                self.observe_draft(timed, first=begin + number == 0)
            begin += len(group)

    def observe_draft(self, done: Pass, first: bool) -> None:
        """Correct the draft's curve by a pass. ``first``: it was the first after a target's.

        Such a pass tells the extra seconds of a cold cache; one of many tokens, after a prompt, hardly notices it.
        """
        costs, weight = self._costs, self._tuning.cost_weight
        more = done.seconds - costs.draft(done.tokens, done.context)
        if first and done.tokens <= 64:
            # A cold cache costs a few passes of one token at most; other work is not taken for it.
            costs.cold += weight * (min(max(more, 0.0), 4.0 * costs.draft(1)) - costs.cold)
            if more < 0:  # no cache makes a pass faster than the curve says
                correct(costs.draft, done, self._tuning)
        else:
            warm = done.seconds - costs.cold if first else done.seconds
            correct(costs.draft, replace(done, seconds=warm), self._tuning)
