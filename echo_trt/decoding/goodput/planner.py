"""The goodput policy: over the whole batch, draft levels and nodes that commit most tokens a second.

Time has a price: the tokens a second that this machine commits anyway (``GoodputPlanner.price``). A plan is worth
its expected tokens less the price of its passes; plain decoding is the plan without a draft. An iteration decides

1. where a pass of another size than the last one costs extra (OpenVINO), how many tokens are verified: a number that is
   held for some dozens of iterations (``sizes``), possibly none beyond the roots. Elsewhere 3 weighs any number.
2. before each draft level: which nodes of the frontier are expanded, if any. What their children will be worth is not
   known yet; the calibration knows how it is distributed (``Acceptance.children``, ``search``).
3. after the last level: how many of all candidates are verified, best first over the batch (``select``); as many as are
   held, or as many as pay under the cost table.

Now and then, where 2 says no, one request is drafted all the same, to see whether that still holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.goodput.acceptance import Acceptance
from echo_trt.decoding.goodput.candidates import Candidates
from echo_trt.decoding.goodput.costs import Costs
from echo_trt.decoding.goodput.ngrams import Chains, NGrams
from echo_trt.decoding.goodput.requests import History
from echo_trt.decoding.goodput.search import BINS, best_portion, portions
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.goodput.sizes import Sizes
from echo_trt.decoding.planner import Copier, Draft, Iteration, Load, Plan
from echo_trt.decoding.super_tree import SuperTree

IN_STEP = 8  # tokens that a draft in step may have to catch up with: an accepted path
SERVES = 32  # iterations that a longer catch-up serves, at most
ROOM_A_DRAFT = 8  # tokens that a request may still write, for each iteration that will draft for it
TIE = 1e-12  # of a value: too little to tell one from another


class GoodputPlanner:
    """Maximise committed tokens a second, with what was learnt while running: costs, acceptance, requests' history."""

    def __init__(
        self,
        name: str,
        settings: GoodputSettings,
        costs: Costs,
        acceptance: Acceptance,
        slots: int,
        ngrams: NGrams | None = None,
        copier: Copier | None = None,
        head: bool = True,
        budget: int = 0,
    ):
        """Candidates come from the draft, unless ``head`` is false, and at no cost from ``copier`` and ``ngrams``.

        budget  knee of the measured costs, which is only reported
        """
        self.name, self.settings, self.budget = name, settings, budget
        self.ngrams, self.copier = (ngrams, copier) if settings.free_candidates else (None, None)
        self._head = head
        self.costs, self.acceptance, self.history, self.sizes = costs, acceptance, History(slots), Sizes()
        self._found: np.ndarray | None = None  # P(accept) of this iteration's candidates, if it has searched
        self._caught_up = False  # whether a draft had to compute more than an accepted path
        self._serial = np.full(slots, -1)

    def plan(self, roots: np.ndarray, draft: Draft, load: Load) -> Plan:
        self._forget_departed(load)
        self._found, self._caught_up = None, False
        settings, history, holds = self.settings, self.history, self._head and self.costs.change > 0
        foreseen = self.acceptance.foreseen(settings.width)
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
        copied = self.copier.continuations(load.slots, settings.max_depth) if self.copier else None
        candidates = Candidates(tree, self.acceptance, weights, load.room, copied, settings.one_path)
        seconds = Verifications(self.costs, load, held_nodes)
        if self._head and load.room.any():
            self._draft(draft, Search(candidates, load, seconds, price))
        if (chains := self._continued(candidates, load)) is not None:
            candidates.go_on(chains)
        chosen = select(candidates.value, candidates.tree, settings.per_request, seconds.upto(len(candidates)), price)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        history.planned(len(tree) > len(roots))
        self._found = candidates.probability[len(roots) :]
        padded_to = 0 if held_nodes is None else self.costs.kept(len(tree), len(roots) + held_nodes)
        return Plan(tree, candidates.probability[nodes], candidates.tree, padded_to)

    def totals(self) -> dict[str, dict[str, float]]:
        return self.acceptance.totals()

    def _forget_departed(self, load: Load) -> None:
        """Start afresh where another request has taken a slot."""
        if load.serial is not None:
            for slot in load.slots[self._serial[load.slots] != load.serial].tolist():
                self.history.forget(slot)
            self._serial[load.slots] = load.serial

    def _continued(self, candidates: Candidates, load: Load) -> Chains | None:
        if self.ngrams is None or load.recent is None:
            return None
        return candidates.continued(self.ngrams, load.recent[:, -self.ngrams.longest :], self.settings.max_depth)

    def price(self, load: Load) -> float:
        """Tokens that a second is worth: plain decoding's rate at this load, times what speculation has gained."""
        plain = self.costs.plain(len(load.slots), load.context) + self.history.host_seconds
        return self.history.speedup * len(load.slots) / plain

    def _draft(self, draft: Draft, search: Search) -> None:
        """Draft levels, while they pay; their nodes join the candidates."""
        candidates, load, settings, history = search.candidates, search.load, self.settings, self.history
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
        candidates.add(requests[:, None], *draft.expand_roots(requests), settings.width)
        best_child = candidates.best_child(requests)
        history.drafted(load.slots[requests], best_child, self.acceptance.foreseen(settings.width).first)
        expanded = 0
        for depth in range(1, settings.max_depth):
            frontier = candidates.frontier(depth, settings.beams)
            if len(frontier) == 0:
                return
            entries = np.arange(1, len(frontier) + 1) * (1 + expanded / len(frontier))
            count = self._worth_expanding(search, candidates.value[frontier], depth, entries)
            if count == 0:
                return
            nodes = np.sort(frontier[:count])
            candidates.add(nodes[:, None], *draft.expand(candidates.tree, nodes), settings.width)
            expanded += count

    def _worth_expanding(self, search: Search, frontier: np.ndarray, depth: int, entries: np.ndarray) -> int:
        """How many of the frontier to expand, values [F], best first, of depth ``depth``; 0 if none pays.

        entries [F]: tokens of the draft's pass that expands the first 1, 2, ... of them. Tried are portions up to all,
        with what this level and the next would bring.
        """
        candidates, load, price = search.candidates, search.load, search.price
        foreseen = self.acceptance.foreseen(self.settings.width)
        if depth >= len(foreseen.below):
            return 0
        costs, ends = self.costs, portions(len(frontier))
        children, brought = foreseen.below[depth], foreseen.brought[depth]
        known = candidates.value[candidates.tree.num_requests :]
        going_on, moved = np.empty(0), np.empty(0, bool)
        if (chains := self._continued(candidates, load)) is not None:
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

    def observe(self, iteration: Iteration) -> None:
        plan, load, history = iteration.plan, iteration.load, self.history
        for number, done in enumerate(iteration.drafts):
            self.costs.observe_draft(done.tokens, done.context, done.seconds, first=number == 0)
        history.decided(iteration.levels, iteration.planning)
        target, prompts = iteration.target, load.prompt_tokens
        self.costs.observe_target(target.tokens, target.context, target.seconds, target.node_context, prompts)
        progress = self._accepted(plan, iteration.path, len(load.slots))
        plain = self.costs.plain(len(load.slots), load.context) + history.host_seconds
        expected, seconds = plan.probability.sum(), iteration.seconds
        history.observe(load.slots, progress, expected, seconds, iteration.host, plain, prompts > 0)
        if prompts == 0 and len(load.slots):
            self.sizes.spent(seconds, expected / len(load.slots))  # expected: too few are accepted in a turn to count
        found, self._found = self._found, None
        if found is not None:
            # With prompts and rests drafts catch up once, which says nothing of the next search.
            drafting = iteration.planning + sum(done.seconds for done in iteration.drafts)
            self.sizes.observe(found, len(load.slots), None if self._caught_up else drafting)

    def _accepted(self, plan: Plan, path: np.ndarray, requests: int) -> np.ndarray:
        """Learn from what was verified. Returns tokens committed of each request: int64 [B]."""
        tree = plan.tree
        drafted = np.flatnonzero(tree.parent >= 0)
        accepted = np.zeros(len(tree))
        accepted[path] = 1
        self.acceptance.observe(tree.source[drafted], plan.probability[drafted], accepted[drafted])
        return np.bincount(tree.request[path], minlength=requests)


@dataclass(frozen=True)
class Search:
    """One iteration's: what there is to verify so far, what that takes, and what a second is worth in tokens."""

    candidates: Candidates
    load: Load
    seconds: Verifications
    price: float


class Verifications:
    """Seconds of verifying 0, 1, ... nodes beside the roots, in one iteration, less what is the same for any number."""

    def __init__(self, costs: Costs, load: Load, held_nodes: int | None = None):
        """``held_nodes``: so many are verified, whatever they are worth: none of them costs anything, and no more are
        priced, which is how those who search know the limit."""
        self._costs, self._tokens, self._held = costs, len(load.slots) + load.prompt_tokens, held_nodes
        # A node attends its request's context, on average this much.
        self._each = costs.target.per_node * load.context / len(load.slots)
        self._seconds = np.empty(0)

    @property
    def held(self) -> bool:
        return self._held is not None

    def upto(self, nodes: int, affordable: float = math.inf) -> np.ndarray:
        """[nodes + 1] or longer; or ending where a verification takes more than ``affordable`` beyond one without, or
        has all that it may."""
        if self._held is not None:
            return np.zeros(self._held + 1)
        while nodes >= len(self._seconds) and (len(self._seconds) == 0 or self._longest() <= affordable):
            numbers = np.arange(min(2 * nodes, 4 * len(self._seconds)) + BINS)
            self._seconds = self._costs.verifications(self._tokens, numbers) + self._each * numbers
        return self._seconds

    def _longest(self) -> float:
        """What the last one takes more than none, at least: sizes beyond it may be spared the price of change."""
        last = len(self._seconds) - 1
        return float(self._costs.target(self._tokens + last) + self._each * last - self._seconds[0])


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
