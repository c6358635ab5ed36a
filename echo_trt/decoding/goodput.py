"""The goodput policy: over the whole batch, draft levels and nodes that commit most tokens a second.

Time has a price: ``rate`` tokens a second are what this machine commits anyway. A plan is worth its expected tokens
less the price of its passes; plain decoding is the plan without a draft. Three decisions an iteration, each a global
search:

1. before each draft level: which nodes of the frontier are expanded, if any. What their children will be worth is not
   known yet; the calibration knows how it is distributed (``Acceptance.children``).
2. after the last level: how many of all candidates are verified, best first over the batch (``select``).
3. now and then, where 1 says no: one request is drafted all the same, to see whether that still holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from echo_trt.decoding.acceptance import Acceptance
from echo_trt.decoding.candidates import Candidates, Continuations
from echo_trt.decoding.costs import Costs
from echo_trt.decoding.grow import Draft
from echo_trt.decoding.history import History
from echo_trt.decoding.policies import Policy
from echo_trt.decoding.ragged import rank_within
from echo_trt.decoding.super_tree import SuperTree

IN_STEP = 8  # tokens that a draft in step may have to catch up with: an accepted path
SERVES = 32  # iterations that a longer catch-up serves, at most
TIE = 1e-12  # of a value: too little to tell one from another
BINS = 64  # of a histogram over values, the best first


@dataclass(frozen=True)
class Load:
    """What one iteration has to do. slots [B]: where each request's history is kept; room [B]: draft tokens in a row
    it can still use; behind [B]: tokens its draft must catch up with first; context: cached tokens of all;
    others: prompt tokens in the same call."""

    slots: np.ndarray
    room: np.ndarray
    behind: np.ndarray
    context: int
    others: int = 0


@dataclass(frozen=True)
class Plan:
    """The super-tree to verify, sorted by request, P(accept) of its nodes [n], 1 at roots, and what it is a part of."""

    tree: SuperTree
    probability: np.ndarray
    candidates: SuperTree

    @classmethod
    def undrafted(cls, roots: np.ndarray) -> Plan:
        """Nothing but ``roots`` [B]: plain decoding."""
        tree = SuperTree.from_roots(roots)
        return cls(tree, np.ones(len(roots)), tree)


class Planner(Protocol):
    """Who decides what an iteration drafts and verifies, and is told what came of it, if it wants to know."""

    def plan(
        self, roots: np.ndarray, draft: Draft | None, policy: Policy, load: Load, copied: Continuations | None = None
    ) -> Plan:
        """The super-tree to verify for ``roots`` [B], the requests' pending tokens."""

    def joined(self, slot: int) -> None:
        """Another request begins in ``slot``."""

    def target_pass(self, tokens: int, context: int, seconds: float, node_context: int = 0, prompts: int = 0) -> None:
        """The target has computed ``tokens``, ``prompts`` of them prompts', with ``context`` cached ones;
        ``node_context`` as in ``Curve.observe``."""

    def draft_pass(self, tokens: int, context: int, seconds: float, first: bool = False) -> None:
        """The same of the draft; ``first`` of this iteration, right after a target's pass."""

    def decided(self, levels: int, seconds: float) -> None:
        """To plan ``levels`` draft levels took ``seconds`` beside their passes."""

    def committed(self, plan: Plan, path: np.ndarray, load: Load, seconds: float, host: float) -> None:
        """An iteration took ``seconds``, ``host`` of them outside passes and planning; ``path``: its accepted nodes."""


class Goodput(Planner):
    """The policy, and what it has learnt while running: costs, acceptance, each request's history."""

    def __init__(self, costs: Costs, acceptance: Acceptance, slots: int):
        self.costs, self.acceptance, self.history = costs, acceptance, History(slots)

    def plan(
        self, roots: np.ndarray, draft: Draft | None, policy: Policy, load: Load, copied: Continuations | None = None
    ) -> Plan:
        """``draft`` None: only what is ``copied`` from the text can be verified, at no cost."""
        if self.history.compares() or self.history.rests(len(roots)):
            return Plan.undrafted(roots)
        price = self.price(load)
        weights = self.history.weights(load.slots)
        candidates = Candidates(SuperTree.from_roots(roots), self.acceptance, weights, load.room, copied)
        seconds = Verifications(self.costs, load)
        if draft is not None and load.room.any():
            self._draft(candidates, draft, policy, load, seconds, price)
        chosen = select(candidates.value, candidates.tree, policy.per_request, seconds.upto(len(candidates)), price)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        self.history.planned(len(tree) > len(roots))
        return Plan(tree, candidates.probability[nodes], candidates.tree)

    def price(self, load: Load) -> float:
        """Tokens that a second is worth: plain decoding's rate at this load, times what speculation has gained."""
        plain = self.costs.target(len(load.slots), load.context) + self.history.host_seconds
        return self.history.caution * self.history.speedup * len(load.slots) / plain

    def _draft(
        self,
        candidates: Candidates,
        draft: Draft,
        policy: Policy,
        load: Load,
        seconds: Verifications,
        price: float,
    ) -> None:
        history = self.history
        history.begin(load.slots)
        open_ = np.flatnonzero(load.room > 0)
        promise = np.minimum(history.promise[load.slots[open_]] * candidates.weights[open_], 2.0)
        best = np.argsort(-promise, kind="stable")
        behind = load.behind[open_]
        # A long catch-up, of a prompt for instance, serves many iterations and is paid over them.
        once = np.maximum(behind - IN_STEP, 0)
        entries = np.cumsum((behind - once + once / np.clip(load.room[open_], 1, SERVES))[best])
        count = self._worth_expanding(candidates, promise[best], 0, entries, load, seconds, price)
        requests = open_[best[:count]]
        if count == 0:
            alone = self.costs.cold + self.costs.draft.per_context * load.context / len(load.slots)
            requests = history.probe(open_, load.slots, self.costs.draft.base(int(behind.max()))[behind] + alone)
            if len(requests) == 0:
                return
        requests = np.sort(requests)
        candidates.add(requests[:, None], *draft.expand_roots(requests), policy.width)
        history.drafted(load.slots[requests], candidates.best_child(requests), self.acceptance.children[0, 0].mean())
        expanded = 0
        for depth in range(1, policy.max_depth):
            frontier = candidates.frontier(depth, policy.beams)
            if len(frontier) == 0:
                return
            entries = np.arange(1, len(frontier) + 1) * (1 + expanded / len(frontier))
            count = self._worth_expanding(candidates, candidates.value[frontier], depth, entries, load, seconds, price)
            if count == 0:
                return
            nodes = np.sort(frontier[:count])
            candidates.add(nodes[:, None], *draft.expand(candidates.tree, nodes), policy.width)
            expanded += count

    def _worth_expanding(
        self,
        candidates: Candidates,
        frontier: np.ndarray,
        depth: int,
        entries: np.ndarray,
        load: Load,
        seconds: Verifications,
        price: float,
    ) -> int:
        """How many of the frontier to expand, values [F], best first, of depth ``depth``; 0 if none pays.

        entries [F]: tokens of the draft's pass that expands the first 1, 2, ... of them. Tried are portions up to all,
        with what this level and the next would bring: each a histogram of values, over which the best number of nodes
        to verify is searched.
        """
        children = self.acceptance.below[depth] if depth < len(self.acceptance.below) else None
        if children is None:
            return 0
        levels, (groups, ends) = len(children), _portions(len(frontier))
        draft = self.costs.draft.base(int(entries[-1]) + 1)[entries[ends - 1].astype(np.int64)]
        draft = draft + self.costs.draft.per_context * load.context * np.minimum(ends / len(load.slots), 1.0)
        draft = (draft + self.history.level_seconds)[:, None] * np.arange(1, levels + 1)
        cost = price * (draft + (self.costs.cold if depth == 0 else 0.0))
        if (frontier.cumsum()[ends - 1, None] * self.acceptance.brought[depth] <= cost).all():
            return 0  # not even if verification were free
        net = self._gain(candidates, frontier, groups, children, seconds, price) - cost
        best = int(net.argmax())
        return int(ends[best // levels]) if net.flat[best] > 0 else 0

    def _gain(
        self,
        candidates: Candidates,
        frontier: np.ndarray,
        groups: np.ndarray,
        children: np.ndarray,
        seconds: Verifications,
        price: float,
    ) -> np.ndarray:
        """What the foreseen ``children`` of the frontier's first 1, 2, ... ``groups`` would add to the best plan, for
        each number of levels: float64 [groups, levels]."""
        levels, variants = len(children), int(groups[-1]) + 1
        alike, groups, number = _alike(frontier, groups)
        worth = np.minimum(alike[:, None, None] * children.reshape(levels, -1), 1.0)  # [F, levels, w * quantiles]
        cell = (groups[:, None, None] * levels + np.arange(levels)[:, None]) * BINS + _bin(worth)
        size, share = variants * levels * BINS, 1.0 / children.shape[-1]
        weight = np.broadcast_to(number[:, None, None], worth.shape)
        hist = np.empty((2, variants, levels, BINS))
        hist[0] = np.bincount(cell.reshape(-1), weight.reshape(-1), size).reshape(variants, levels, BINS)
        hist[1] = np.bincount(cell.reshape(-1), (weight * worth).reshape(-1), size).reshape(variants, levels, BINS)
        now = _histogram(candidates.value[candidates.tree.num_requests :])[:, None]
        plans = now + share * hist.cumsum(axis=1).cumsum(axis=2).reshape(2, -1, BINS)
        value = _best_value(np.concatenate((now, plans), axis=1), seconds, price)
        return (value[1:] - value[0]).reshape(variants, levels)

    def joined(self, slot: int) -> None:
        self.history.forget(slot)

    def target_pass(self, tokens: int, context: int, seconds: float, node_context: int = 0, prompts: int = 0) -> None:
        self.costs.observe_target(tokens, context, seconds, node_context, prompts)

    def decided(self, levels: int, seconds: float) -> None:
        self.history.decided(levels, seconds)

    def draft_pass(self, tokens: int, context: int, seconds: float, first: bool = False) -> None:
        self.costs.observe_draft(tokens, context, seconds, first)

    def committed(self, plan: Plan, path: np.ndarray, load: Load, seconds: float, host: float) -> None:
        tree = plan.tree
        drafted = np.flatnonzero(tree.parent >= 0)
        accepted = np.zeros(len(tree))
        accepted[path] = 1
        self.acceptance.observe(tree.source[drafted], plan.probability[drafted], accepted[drafted])
        progress = np.bincount(tree.request[path], minlength=len(load.slots))
        plain = self.costs.target(len(load.slots), load.context) + self.history.host_seconds
        self.history.observe(load.slots, progress, plan.probability.sum(), seconds, host, plain, load.others > 0)


class Verifications:
    """Seconds of verifying 0, 1, ... nodes beside the roots, in one iteration, less what is the same for any number."""

    def __init__(self, costs: Costs, load: Load):
        self._costs, self._tokens = costs, len(load.slots) + load.others
        # A node attends its request's context, on average this much.
        self._each = costs.target.per_node * load.context / len(load.slots)
        self._seconds = np.empty(0)

    def upto(self, nodes: int) -> np.ndarray:
        """[nodes + 1] or longer."""
        if nodes >= len(self._seconds):
            numbers = np.arange(2 * nodes + BINS)
            self._seconds = self._costs.verifications(self._tokens, numbers) + self._each * numbers
        return self._seconds


def _best_value(plans: np.ndarray, seconds: Verifications, price: float) -> np.ndarray:
    """plans [2, ..., BINS] -> the most that verifying the best of them, any number, is worth [...]."""
    count, total = plans.cumsum(axis=-1)
    low = count.astype(np.int64)
    table = seconds.upto(int(low.max()) + 1)
    below = table[low]
    time = below + (count - low) * (table[low + 1] - below)
    return np.maximum((total - price * time).max(axis=-1), -price * table[0])


def select(value: np.ndarray, tree: SuperTree, per_request: int, seconds: np.ndarray, price: float) -> np.ndarray:
    """The nodes to verify, roots among them: indices, ascending. The best number of the best, over the whole batch.

    value [n] only falls along a path, so that the best k are ancestor-closed for every k. seconds [n - B + 1]: the
    target's pass with 0, 1, ... nodes more than roots; jagged, so every k is tried.
    """
    roots = np.arange(tree.num_requests)
    nodes = np.arange(tree.num_requests, len(tree))
    # A child may be worth exactly what its parent is, and comes after it. A stable sort takes five times as long.
    nodes = nodes[np.argsort(TIE * tree.depth[nodes] - value[nodes])]
    nodes = nodes[rank_within(tree.request[nodes]) < per_request - 1]
    worth = np.concatenate(([0.0], np.cumsum(value[nodes]))) - price * seconds[: len(nodes) + 1]
    return np.sort(np.concatenate((roots, nodes[: int(worth.argmax())])))


@cache
def _portions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """How a set of ``count`` grows, to 1, 2, 4, ... or, if it is large, 1, 4, 16, ...: the step [count] in which each
    element joins, and the set's size after each step."""
    factor = 2 if count <= 16 else 4
    steps = np.ceil(np.log(np.arange(1, count + 1)) / np.log(factor) - 1e-9).astype(np.int64)
    return steps, np.cumsum(np.bincount(steps))


def _alike(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """values [F], best first, and their ascending groups [F] -> of those that share group and bin their mean, their
    group and how many they are, all [m]: of a large batch's values there are few, whatever F."""
    if len(values) <= BINS:
        return values, groups, np.ones(len(values))
    cell = groups * BINS + _bin(values)
    begin = np.flatnonzero(np.diff(cell, prepend=-1))
    number = np.diff(begin, append=len(values))
    return np.add.reduceat(values, begin) / number, groups[begin], number.astype(np.float64)


def _histogram(values: np.ndarray) -> np.ndarray:
    """Numbers and sums of values by bins: float64 [2, BINS]."""
    cell = _bin(values)
    return np.stack((np.bincount(cell, minlength=BINS), np.bincount(cell, values, minlength=BINS)))


def _bin(values: np.ndarray) -> np.ndarray:
    return ((1.0 - np.minimum(values, 1.0)) * (BINS - 1e-6)).astype(np.int64)
