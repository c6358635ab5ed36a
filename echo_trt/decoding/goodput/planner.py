"""The goodput policy: over the whole batch, draft levels and nodes that commit most tokens a second.

Time has a price: the tokens a second that this machine commits anyway (``GoodputPlanner.price``). A plan is worth
its expected tokens less the price of its passes; plain decoding is the plan without a draft. An iteration decides

1. how many tokens are verified at most, or that it decodes plainly: the rung that the load holds (``ladder``).
2. before each draft level: which nodes of the frontier are expanded, if any. What their children will be worth is not
   known yet; the calibration knows how it is distributed (``Acceptance.children``, ``search``).
3. after the last level: how many of all candidates are verified, best first over the batch (``select``). Where a pass
   of another size than the last one costs extra (OpenVINO) the rung is filled, elsewhere as many as pay are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.decoding.arrays import compiled
from echo_trt.decoding.goodput.acceptance import Acceptance
from echo_trt.decoding.goodput.candidates import Candidates
from echo_trt.decoding.goodput.costs import Costs
from echo_trt.decoding.goodput.ladder import DOUBT, PLAIN, Ladder
from echo_trt.decoding.goodput.ngrams import Chains, NGrams
from echo_trt.decoding.goodput.requests import History
from echo_trt.decoding.goodput.search import best_portion, portions
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.planner import Copier, Draft, Iteration, Load, Plan
from echo_trt.decoding.super_tree import SuperTree

IN_STEP = 8  # tokens that a draft in step may have to catch up with: an accepted path
SERVES = 32  # iterations that a longer catch-up serves, at most
ROOM_A_DRAFT = 8  # tokens that a request may still write, for each iteration that will draft for it
LEVELS = 1.6  # draft levels that are foreseen, a doubling of a request's verified tokens
MOST, ALONE = 8, 64  # tokens that are verified at most: a request, and besides
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
        self.costs, self.acceptance, self.history, self.ladder = costs, acceptance, History(slots), Ladder()
        self._serial = np.full(slots, -1)

    def plan(self, roots: np.ndarray, draft: Draft, load: Load) -> Plan:
        self._forget_departed(load)
        settings, history, costs, count = self.settings, self.history, self.costs, len(roots)
        rung = self.ladder.rung(count, lambda: self._foresee(load))
        if rung == PLAIN:
            return Plan.undrafted(roots)
        size = max(rung, costs.padded(count + 1))
        tree = SuperTree.from_roots(roots)
        copied = self.copier.continuations(load.slots, settings.max_depth) if self.copier else None
        candidates = Candidates(
            tree, self.acceptance, history.weights(load.slots), load.room, copied, settings.one_path
        )
        search = Search(candidates, load, self._verifying(load, size - count), self.price(load))
        if self._head and load.room.any():
            self._draft(draft, search)
        if (chains := self._continued(candidates, load)) is not None:
            candidates.go_on(chains)
        chosen = select(candidates.value, candidates.tree, settings.per_request, search.seconds, search.price)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        return Plan(
            tree, candidates.probability[nodes], candidates.tree, costs.kept(len(tree), size) if self._holds else 0
        )

    @property
    def _holds(self) -> bool:
        """Whether verifications fill their rung. Copied text alone is too rare for that."""
        return self._head and self.costs.change > 0

    def _foresee(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Foresee what the ladder asks for: rungs int64 [R] and their scores float64 [R]."""
        costs, history, count = self.costs, self.history, len(load.slots)
        rungs = costs.rungs(count, MOST * count + ALONE)
        if not self._head:
            return rungs[-1:], np.full(1, TIE)
        each = (rungs - count) / count
        levels = np.minimum(np.minimum(LEVELS * np.log2(1 + each), each), self.settings.max_depth)
        level = costs.draft(2 * count, load.context) + history.level_seconds
        target = costs.target.base(int(rungs[-1]))[rungs] + costs.target.per_context * load.context
        seconds = target + costs.target.per_node * each * load.context + costs.cold + levels * level
        tokens = 1 + self.acceptance.foreseen(self.settings.width).best(rungs - count, count) / count
        host, plain = history.host_seconds, costs.plain(count, load.context)
        scores = np.log(tokens * (plain + host) / (seconds + host))
        if self._holds:
            return rungs, scores - DOUBT
        return rungs[-1:], np.maximum(scores.max(keepdims=True), TIE)  # the search may choose any size, or none

    def _verifying(self, load: Load, nodes: int) -> np.ndarray:
        """Seconds that verifying 0, 1, ... ``nodes`` nodes takes longer than verifying none: [nodes + 1]."""
        costs, count = self.costs, len(load.slots)
        if self._holds:  # the rung is filled, whatever its nodes are worth
            return np.zeros(nodes + 1)
        number = np.arange(nodes + 1)
        seconds: np.ndarray = costs.verifications(count + load.prompt_tokens, number)
        seconds += costs.target.per_node * load.context / count * number
        seconds[1:] += 2 * costs.change  # there and back
        seconds -= seconds[0]
        return seconds

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
        return self.history.speedup * self._plain_rate(load)

    def _plain_rate(self, load: Load) -> float:
        """Tokens a second of plain decoding."""
        count = len(load.slots)
        return count / (self.costs.plain(count, load.context) + self.history.host_seconds)

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
            price * search.seconds,
        )

    def observe(self, iteration: Iteration) -> None:
        plan, load, history = iteration.plan, iteration.load, self.history
        for number, done in enumerate(iteration.drafts):
            self.costs.observe_draft(done.tokens, done.context, done.seconds, first=number == 0)
        history.decided(iteration.levels, iteration.planning)
        target, prompts = iteration.target, load.prompt_tokens
        self.costs.observe_target(target.tokens, target.context, target.seconds, target.node_context, prompts)
        progress = self._accepted(plan, iteration.path, len(load.slots))
        history.observe(load.slots, progress, iteration.seconds)
        if prompts == 0 and len(load.slots):
            count = len(load.slots)  # accepted tokens are too few in a trial to count
            expected = count + history.verified(plan.probability.sum() - count, len(iteration.path) - count)
            history.spent(expected, self._plain_rate(load) * iteration.seconds, iteration.host)
            self.ladder.observe(expected, iteration.seconds)

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
    """What one iteration searches through.

    candidates  nodes that there are to verify so far
    seconds     float64 [n], what verifying 0, 1, ..., n - 1 nodes takes longer than verifying none
    price       tokens that a second is worth
    """

    candidates: Candidates
    load: Load
    seconds: np.ndarray
    price: float


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
