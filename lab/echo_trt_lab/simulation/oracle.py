"""The oracle: a policy with goodput's candidates and costs that knows which candidates will be accepted.

An iteration maximises tokens - rate * seconds. ``rate`` is raised to the tokens per second of the whole walk until the
two agree (Dinkelbach's method), which gives the most tokens per second in the long run if an iteration's choice does
not change the next one's state. The search is exact for a single request, and where the seconds of a draft pass do not
depend on its entries (bandwidth-bound). Elsewhere it tries every number of levels, with requests in the order of the
tokens that an entry adds: a lower bound, a little below the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt_lab.calibration.trees import Trees
from echo_trt_lab.ngram_tables import context_keys, look_up
from echo_trt_lab.simulation.machines import Machine
from echo_trt_lab.simulation.replay import Step, Tally
from echo_trt_lab.simulation.walk import Recording, Walk

ROUNDS, TOLERANCE = 8, 1e-3  # of Dinkelbach's method. More rounds or less tolerance: a rate nearer to the best, slower


def predict(trees: Trees, settings: GoodputSettings, ngrams: NGrams | None = None) -> np.ndarray:
    """Count the draft tokens in a row that will be accepted at a position after 0, 1, ... levels of drafting.

    Returns int [P, levels + 1], within ``settings``'s max_depth, width and tokens per request. Copies and n-grams need
    no level, and n-grams go on where drafts end. The last token of an answer needs no draft.
    """
    maximum = np.minimum(trees.left - 1, min(settings.max_depth, settings.per_request - 1)).clip(0)
    drafted = np.minimum(_drafted_run(trees, settings.width), maximum)
    levels = np.arange(drafted.max(initial=0) + 1)
    runs = np.stack((*np.minimum(levels[:, None], drafted), np.minimum(_copied_run(trees), maximum)), axis=1)
    if ngrams is not None:
        index = (trees.answer_begins[trees.request] + trees.index)[:, None] + runs
        runs = np.minimum(runs + _named_run(trees, ngrams)[index], maximum[:, None])
    # Copied tokens are there at any level.
    return np.maximum.accumulate(np.maximum(runs[:, :-1], runs[:, -1:]), axis=1)


def _named_run(trees: Trees, ngrams: NGrams) -> np.ndarray:
    """Count the right tokens in a row that n-grams name from a place of the answers on: int [tokens + 1]."""
    right = np.zeros(len(trees.answers) + 1, bool)
    for begin, end in zip(trees.answer_begins[:-1], trees.answer_begins[1:], strict=True):
        answer = trees.answers[begin:end].astype(np.int64)
        right[begin:end] = look_up(ngrams, context_keys(answer, ngrams.longest)[:-1])[0] == answer
    indices = np.arange(len(right))
    wrong = np.where(right, len(right), indices)
    return np.minimum.accumulate(wrong[::-1])[::-1] - indices


def _copied_run(trees: Trees) -> np.ndarray:
    count, length = trees.copied.shape
    position = np.repeat(np.arange(count), length)
    truth = trees.truth(position, np.tile(np.arange(1, length + 1), count)).reshape(count, length)
    return np.logical_and.accumulate((trees.copied == truth) & (truth >= 0), axis=1).sum(axis=1)


def _drafted_run(trees: Trees, width: int) -> np.ndarray:
    """Return the depth of a tree's deepest accepted node, int64 [P], where ``width`` children of a node count."""
    position = np.repeat(np.arange(len(trees)), np.diff(trees.node_begins))
    above = np.where(trees.parent < 0, -1, trees.node_begins[position] + trees.parent)
    first = np.where(above < 0, trees.node_begins[position], trees.first_child[0][above])
    right = trees.token == trees.truth(position, trees.depth.astype(np.int64))
    right &= np.arange(len(above)) - first < width
    run = np.zeros(len(trees), np.int64)
    accepted = np.ones(len(above) + 1, bool)  # index -1, the last, stands for all roots
    for depth in range(1, int(trees.depth.max(initial=0)) + 1):
        level = np.flatnonzero(trees.depth == depth)
        accepted[level] = right[level] & accepted[above[level]]
        run[position[level[accepted[level]]]] = depth
    return run


@dataclass(frozen=True)
class OraclePlan:
    """The oracle's plan of one iteration.

    verified       int [B], a request's draft tokens that are verified, all of which are accepted
    drafted        int [m], requests that are drafted for
    levels         draft passes
    draft_seconds  of those passes
    worth          tokens beside the roots - rate * seconds of draft and target
    """

    verified: np.ndarray
    drafted: np.ndarray
    levels: int
    draft_seconds: float
    worth: float


def choose(
    ahead: np.ndarray,
    draft_lag: np.ndarray,
    rate: float,
    costs: Costs,
    context: int,
    level_seconds: float = 0.0,
    block: int = 0,
) -> OraclePlan:
    """Choose drafts and verification of one iteration.

    ahead          int [B, levels + 1], tokens in a row that will be accepted (``predict``)
    draft_lag      int [B], entries that a request's first level needs
    rate           tokens per second
    context        cached tokens of all requests
    level_seconds  of a level, beside its pass
    block          rows of a request's only pass, by a block drafter; 0: one pass per level
    """
    batch, free, upto = len(ahead), int(ahead[:, 0].sum()), int(ahead[:, -1].sum())
    worth = np.arange(upto + 1) - rate * _verifying(costs, batch, context, np.arange(upto + 1))
    best_upto = np.maximum.accumulate(worth)  # of verifying up to that number
    top = best_upto[free], 0, 0.0, np.zeros(0, np.int64)
    for levels in range(max(ahead.shape[1] - 1, 1) if block else 1, ahead.shape[1]):
        needed = _needed(ahead, levels)
        able = np.flatnonzero(needed)
        if block:
            entries = draft_lag[able, None] + block
        else:  # a level's pass has the entries of levels above, too
            entries = np.where(needed[able, None] > np.arange(levels), np.arange(levels), 0)
            entries[:, 0] = draft_lag[able]
        added = (ahead[:, levels] - ahead[:, 0])[able]
        order = np.argsort(-added / entries.sum(axis=1), kind="stable")
        total = entries[order].cumsum(axis=0)
        seconds = costs.draft.base(int(total.max(initial=0)))[total].sum(axis=1)
        seconds += costs.draft.per_context * context * (total > 0).sum(axis=1) + costs.cold
        seconds += level_seconds * (1 if block else levels)
        net = best_upto[free + added[order].cumsum()] - rate * seconds
        if len(net) and net.max() > top[0]:
            count = int(net.argmax())
            top = net[count], levels, float(seconds[count]), able[order[: count + 1]]
    value, levels, seconds, chosen = top
    reach = ahead[:, 0].copy()
    reach[chosen] = ahead[chosen, levels]
    passes = int(_needed(ahead, levels)[chosen].max(initial=0))
    passes = min(passes, 1) if block else passes
    number = int(worth[: reach.sum() + 1].argmax())
    return OraclePlan(_shallow_first(reach, number), chosen, passes, seconds, float(value))


def _needed(ahead: np.ndarray, levels: int) -> np.ndarray:
    """Return the fewest levels, int [B], that bring a request as many tokens as ``levels`` do."""
    return (ahead == ahead[:, levels, None]).argmax(axis=1)


def _verifying(costs: Costs, batch: int, context: int, nodes: np.ndarray) -> np.ndarray:
    """Compute the seconds of verifying ``nodes`` beside the roots, in requests that have the mean context."""
    return costs.verifications(batch, nodes) + costs.target.per_node * context / batch * nodes


def _shallow_first(reach: np.ndarray, number: int) -> np.ndarray:
    """Take the ``number`` shallowest tokens of paths that are ``reach``, int [B], long: int [B]."""
    if number >= reach.sum():
        return reach
    level = 0
    while np.minimum(reach, level + 1).sum() <= number:
        level += 1
    taken = np.minimum(reach, level)
    more = np.flatnonzero(reach > level)[: number - int(taken.sum())]
    taken[more] += 1
    return taken


class Oracle:
    """A ``replay.Replay`` with foresight; ``settings`` bound the candidates."""

    def __init__(
        self,
        recording: Recording,
        machine: Machine,
        settings: GoodputSettings,
        batch: int,
        prompt: int,
        ngrams: NGrams | None = None,
        block: int = 0,
    ):
        self._block = block
        self._recording, self._batch, self._prompt = recording, batch, prompt
        self._costs, self._host, self._level = machine.costs(), machine.host_seconds, machine.level_seconds
        self._costs.change = 0.0  # a change of size is free
        if device := machine.device:  # a draft is one wait at least
            self._host += device.seconds(1)
            self._costs.cold += device.seconds(1)
        self._ahead = predict(recording.trees, settings, ngrams)

    def run(self, tokens: int) -> Tally:
        """Walk until about ``tokens`` are emitted, then again with the measured rate; returns the best walk's sums."""
        plain = self._batch / (self._costs.target(self._batch, self._batch * self._prompt) + self._host)
        best = self._round(plain, tokens)
        rate = best.rate
        for _ in range(ROUNDS):
            tally = self._round(rate, tokens)
            best = max(best, tally, key=lambda t: t.rate)
            if abs(tally.rate / rate - 1) < TOLERANCE:
                break
            rate = tally.rate
        return best

    def _round(self, rate: float, tokens: int) -> Tally:
        walk, tally = Walk(self._recording, self._batch, self._prompt), Tally(np.zeros(self._batch, np.int64))
        while tally.tokens < tokens:
            tally.add(self._step(walk, rate))
        return tally

    def _step(self, walk: Walk, rate: float) -> Step:
        context = int(walk.context.sum())
        ahead = self._ahead[walk.positions]
        choice = choose(ahead, walk.draft_lag.clip(1), rate, self._costs, context, self._level, self._block)
        walk.draft_lag[choice.drafted] = 0
        verified = int(choice.verified.sum())
        seconds = self._host + choice.draft_seconds + self._costs.target.per_context * context
        seconds += float(_verifying(self._costs, self._batch, context, np.array([verified]))[0])
        kept = walk.advance(choice.verified + 1)
        return Step(kept, verified, verified, choice.levels, seconds)
