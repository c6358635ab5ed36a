"""The goodput policy: over the whole batch, draft levels and nodes that commit most tokens a second.

Time has a price: so many tokens a second are what this machine commits anyway (``Goodput.price``). A plan is worth its
expected tokens less the price of its passes; plain decoding is the plan without a draft. An iteration decides

1. where a pass of another size than the last one costs extra (OpenVINO), how many tokens are verified: a number that is
   held for some dozens of iterations (``sizes``), possibly none beyond the roots. Elsewhere 3 weighs any number.
2. before each draft level: which nodes of the frontier are expanded, if any. What their children will be worth is not
   known yet; the calibration knows how it is distributed (``Acceptance.children``, ``foresight``).
3. after the last level: how many of all candidates are verified, best first over the batch (``select``); as many as are
   held, or as many as pay under the cost table.

Now and then, where 2 says no, one request is drafted all the same, to see whether that still holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from echo_trt.decoding.acceptance import Acceptance
from echo_trt.decoding.candidates import Candidates, Continuations
from echo_trt.decoding.compiled import compiled
from echo_trt.decoding.costs import Costs
from echo_trt.decoding.foresight import BINS, best_portion, portions
from echo_trt.decoding.grow import Draft
from echo_trt.decoding.history import History
from echo_trt.decoding.ngrams import NGrams
from echo_trt.decoding.policies import Policy
from echo_trt.decoding.sizes import Sizes
from echo_trt.decoding.super_tree import SuperTree

IN_STEP = 8  # tokens that a draft in step may have to catch up with: an accepted path
SERVES = 32  # iterations that a longer catch-up serves, at most
ROOM_A_DRAFT = 8  # tokens that a request may still write, for each iteration that will draft for it
TIE = 1e-12  # of a value: too little to tell one from another


@dataclass(frozen=True)
class Load:
    """What one iteration has to do. slots [B]: where each request's history is kept; room [B]: draft tokens in a row
    it can still use; behind [B]: tokens its draft must catch up with first; context: cached tokens of all;
    others: prompt tokens in the same call; recent [B, n]: the last tokens before each root, -1 where there are none."""

    slots: np.ndarray
    room: np.ndarray
    behind: np.ndarray
    context: int
    others: int = 0
    recent: np.ndarray | None = None


@dataclass(frozen=True)
class Plan:
    """The super-tree to verify, sorted by request, P(accept) of its nodes [n], 1 at roots, and what it is a part of.
    ``fill``: tokens that a pass with nothing else in it is filled up to."""

    tree: SuperTree
    probability: np.ndarray
    candidates: SuperTree
    fill: int = 0

    @classmethod
    def undrafted(cls, roots: np.ndarray) -> Plan:
        """Nothing but ``roots`` [B]: plain decoding."""
        tree = SuperTree.from_roots(roots)
        return cls(tree, np.ones(len(roots)), tree)


class Planner(Protocol):
    """Who decides what an iteration drafts and verifies, and is told what came of it, if it wants to know.

    With ``ngrams`` it wants each load's ``recent`` tokens.
    """

    ngrams: NGrams | None = None

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

    def __init__(self, costs: Costs, acceptance: Acceptance, slots: int, ngrams: NGrams | None = None):
        """``ngrams`` go on where drafts end, unless the policy leaves text to the head."""
        self.ngrams = ngrams
        self.costs, self.acceptance, self.history, self.sizes = costs, acceptance, History(slots), Sizes()
        self._found: np.ndarray | None = None  # P(accept) of this iteration's candidates, if it has searched
        self._drafting, self._caught_up = 0.0, False  # seconds in this iteration; after more than an accepted path

    def plan(
        self, roots: np.ndarray, draft: Draft | None, policy: Policy, load: Load, copied: Continuations | None = None
    ) -> Plan:
        """``draft`` None: only what is ``copied`` from the text and what n-grams say can be verified, at no cost."""
        self._found, self._drafting, self._caught_up = None, 0.0, False
        history, holds = self.history, draft is not None and self.costs.change > 0
        foreseen = self.acceptance.foreseen(policy.width)
        held_nodes = None
        if holds:
            host, level = history.host_seconds, history.level_seconds
            held_nodes = self.sizes.nodes(len(roots), load.context, self.costs, host, foreseen, level)
        if held_nodes == 0 or (not holds and (history.compares() or history.rests(len(roots)))):
            return Plan.undrafted(roots)
        # Where sizes are held their rates are measured, and caution would keep from them what they are measured by.
        price = self.price(load) * (1.0 if holds else history.caution)
        weights = history.weights(load.slots)
        tree = SuperTree.from_roots(roots)
        candidates = Candidates(tree, self.acceptance, weights, load.room, copied, policy.one_path)
        seconds = Verifications(self.costs, load, held_nodes)
        if draft is not None and load.room.any():
            self._draft(draft, Search(candidates, policy, load, seconds, price))
        if self.ngrams is not None and policy.copies:
            candidates.go_on(candidates.continued(self.ngrams, load.recent, policy.max_depth))
        chosen = select(candidates.value, candidates.tree, policy.per_request, seconds.upto(len(candidates)), price)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        history.planned(len(tree) > len(roots))
        self._found = candidates.probability[len(roots) :]
        fill = self.costs.kept(len(tree), len(roots) + held_nodes) if holds else 0
        return Plan(tree, candidates.probability[nodes], candidates.tree, fill)

    def price(self, load: Load) -> float:
        """Tokens that a second is worth: plain decoding's rate at this load, times what speculation has gained."""
        plain = self.costs.plain(len(load.slots), load.context) + self.history.host_seconds
        return self.history.speedup * len(load.slots) / plain

    def _draft(self, draft: Draft, search: Search) -> None:
        """Draft levels, while they pay; their nodes join the candidates."""
        candidates, policy, load = search.candidates, search.policy, search.load
        history = self.history
        history.begin(load.slots)
        open_ = np.flatnonzero(load.room > 0)
        promise = np.minimum(history.promise[load.slots[open_]] * candidates.weights[open_], 2.0)
        best = np.argsort(-promise, kind="stable")
        behind = load.behind[open_]
        # A long catch-up, of a prompt for instance, serves those iterations that will draft, and is paid over them.
        once, serves = np.maximum(behind - IN_STEP, 0), np.clip(load.room[open_] / ROOM_A_DRAFT, 1, SERVES)
        entries = np.cumsum((behind - once + once / serves)[best])
        count = self._worth_expanding(search, promise[best], 0, entries)
        requests = open_[best[:count]]
        if count == 0:
            alone = self.costs.cold + self.costs.draft.per_context * load.context / len(load.slots)
            requests = history.probe(open_, load.slots, self.costs.draft.base(int(behind.max()))[behind] + alone)
            if len(requests) == 0:
                return
        requests = np.sort(requests)
        self._caught_up = load.behind[requests].max() > IN_STEP
        candidates.add(requests[:, None], *draft.expand_roots(requests), policy.width)
        best_child = candidates.best_child(requests)
        history.drafted(load.slots[requests], best_child, self.acceptance.foreseen(policy.width).first)
        expanded = 0
        for depth in range(1, policy.max_depth):
            frontier = candidates.frontier(depth, policy.beams)
            if len(frontier) == 0:
                return
            entries = np.arange(1, len(frontier) + 1) * (1 + expanded / len(frontier))
            count = self._worth_expanding(search, candidates.value[frontier], depth, entries)
            if count == 0:
                return
            nodes = np.sort(frontier[:count])
            candidates.add(nodes[:, None], *draft.expand(candidates.tree, nodes), policy.width)
            expanded += count

    def _worth_expanding(self, search: Search, frontier: np.ndarray, depth: int, entries: np.ndarray) -> int:
        """How many of the frontier to expand, values [F], best first, of depth ``depth``; 0 if none pays.

        entries [F]: tokens of the draft's pass that expands the first 1, 2, ... of them. Tried are portions up to all,
        with what this level and the next would bring.
        """
        candidates, policy, load, price = search.candidates, search.policy, search.load, search.price
        foreseen = self.acceptance.foreseen(policy.width)
        if depth >= len(foreseen.below):
            return 0
        costs, ends = self.costs, portions(len(frontier))
        children, brought = foreseen.below[depth], foreseen.brought[depth]
        known = candidates.value[candidates.tree.num_requests :]
        going_on, moved = np.empty(0), np.empty(0, bool)
        if self.ngrams is not None and policy.copies:
            chains = candidates.continued(self.ngrams, load.recent, policy.max_depth)
            going_on = chains.probability * candidates.weights[chains.request]
            moved = candidates.tree.depth[chains.leaf] == depth
        passes = costs.draft.base(int(entries[-1]) + 1)[entries[ends - 1].astype(np.int64)]
        passes = passes + costs.draft.per_context * load.context * np.minimum(ends / len(load.slots), 1.0)
        nodes = len(known) + len(going_on) + len(frontier) * children.shape[0] * children.shape[1]
        affordable = math.inf
        if not search.seconds.held:
            affordable = (known.sum() + going_on.sum() + frontier.sum() * brought[-1]) / price
        return best_portion(
            frontier,
            ends,
            price * (passes + self.history.level_seconds),
            price * costs.cold if depth == 0 else 0.0,
            children,
            brought,
            known,
            going_on,
            moved,
            price * search.seconds.upto(nodes, affordable),
        )

    def joined(self, slot: int) -> None:
        self.history.forget(slot)

    def target_pass(self, tokens: int, context: int, seconds: float, node_context: int = 0, prompts: int = 0) -> None:
        self.costs.observe_target(tokens, context, seconds, node_context, prompts)

    def decided(self, levels: int, seconds: float) -> None:
        self._drafting += seconds
        self.history.decided(levels, seconds)

    def draft_pass(self, tokens: int, context: int, seconds: float, first: bool = False) -> None:
        self._drafting += seconds
        self.costs.observe_draft(tokens, context, seconds, first)

    def committed(self, plan: Plan, path: np.ndarray, load: Load, seconds: float, host: float) -> None:
        tree = plan.tree
        drafted = np.flatnonzero(tree.parent >= 0)
        accepted = np.zeros(len(tree))
        accepted[path] = 1
        self.acceptance.observe(tree.source[drafted], plan.probability[drafted], accepted[drafted])
        progress = np.bincount(tree.request[path], minlength=len(load.slots))
        plain = self.costs.plain(len(load.slots), load.context) + self.history.host_seconds
        expected = plan.probability.sum()
        self.history.observe(load.slots, progress, expected, seconds, host, plain, load.others > 0)
        if load.others == 0 and len(load.slots):
            self.sizes.spent(seconds, expected / len(load.slots))  # expected: too few are accepted in a turn to count
        if self._found is not None:
            drafting = None if self._caught_up else self._drafting  # with prompts and rests drafts catch up once
            self.sizes.observe(self._found, len(load.slots), drafting)


@dataclass(frozen=True)
class Search:
    """One iteration's: what there is to verify so far, what that takes, and what a second is worth in tokens."""

    candidates: Candidates
    policy: Policy
    load: Load
    seconds: Verifications
    price: float


class Verifications:
    """Seconds of verifying 0, 1, ... nodes beside the roots, in one iteration, less what is the same for any number."""

    def __init__(self, costs: Costs, load: Load, held_nodes: int | None = None):
        """``held_nodes``: so many are verified, whatever they are worth: none of them costs anything, and no more are
        priced, which is how those who search know the limit."""
        self._costs, self._tokens, self._held = costs, len(load.slots) + load.others, held_nodes
        # A node attends its request's context, on average this much.
        self._each = costs.target.per_node * load.context / len(load.slots)
        self._seconds = np.empty(0)

    @property
    def held(self) -> bool:
        return self._held is not None

    def upto(self, nodes: int, affordable: float = math.inf) -> np.ndarray:
        """[nodes + 1] or longer; or ending where a verification takes more than ``affordable`` beyond one without, or
        has all that it may."""
        if self.held:
            return np.zeros(self._held + 1)
        while nodes >= len(self._seconds) and (len(self._seconds) == 0 or self._longest() <= affordable):
            numbers = np.arange(min(2 * nodes, 4 * len(self._seconds)) + BINS)
            self._seconds = self._costs.verifications(self._tokens, numbers) + self._each * numbers
        return self._seconds

    def _longest(self) -> float:
        """What the last one takes more than none, at least: sizes beyond it may be spared the price of change."""
        last = len(self._seconds) - 1
        return self._costs.target(self._tokens + last) + self._each * last - self._seconds[0]


def select(value: np.ndarray, tree: SuperTree, per_request: int, seconds: np.ndarray, price: float) -> np.ndarray:
    """The nodes to verify, roots among them: indices, ascending. The best number of the best, over the whole batch.

    value [n] only falls along a path, so that the best k are ancestor-closed for every k. seconds [n - B + 1]: the
    target's pass with 0, 1, ... nodes more than roots, at least as far as they can pay; jagged, so every k is tried.
    """
    return _select(value, tree.depth, tree.request, tree.num_requests, per_request, seconds, price)


@compiled("i8[::1](f8[::1], i8[::1], i8[::1], i8, i8, f8[::1], f8)")
def _select(
    value: np.ndarray,
    depth: np.ndarray,
    request: np.ndarray,
    requests: int,
    per_request: int,
    seconds: np.ndarray,
    price: float,
) -> np.ndarray:
    nodes = requests + np.flatnonzero(value[requests:] > 0)
    order = TIE * depth[nodes] - value[nodes]  # a child may be worth exactly what its parent is, and comes after
    # As many as may cost no more than all together are worth: of a large batch few, and the others need no sorting.
    most = np.flatnonzero(price * (seconds - seconds[0]) <= value[nodes].sum())[-1]
    if most < len(nodes):
        best = np.flatnonzero(order <= np.partition(order, most)[most])
        if np.bincount(request[nodes[best]], minlength=1).max() < per_request:
            nodes, order = nodes[best], order[best]
    chosen, taken = np.empty(len(nodes), np.int64), np.zeros(requests, np.int64)
    count, total, kept, worth = 0, 0.0, 0, -price * seconds[0]
    for node in nodes[np.argsort(order, kind="mergesort")]:
        if count + 1 >= len(seconds):
            break
        if taken[request[node]] >= per_request - 1:
            continue
        taken[request[node]] += 1
        chosen[count] = node
        count += 1
        total += value[node]
        if total - price * seconds[count] > worth:
            kept, worth = count, total - price * seconds[count]
    return np.concatenate((np.arange(requests), np.sort(chosen[:kept])))
