"""The goodput policy: over the whole batch, draft levels and nodes that commit most tokens a second.

Time has a price: the tokens a second that this machine commits anyway (``GoodputPlanner.price``). A plan is worth
its expected tokens less the price of its passes; plain decoding is the plan without a draft. An iteration decides

1. how many tokens are verified at most, or that it decodes plainly: the rung that the load holds (``ladder``).
2. before a draft level: which nodes of the frontier are expanded, if any. The values of their children are not known
   yet; the calibration knows how they are distributed (``Acceptance.children``, ``search``). A block drafter's pass is
   weighed once, with all its levels; its trees are then grown best first, at no cost (``Candidates.promising``).
3. after the last level: how many of all candidates are verified, best first over the batch (``select``). Where a pass
   of another size than the last one costs extra (OpenVINO) the rung is filled, elsewhere as many as pay are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.decoding.goodput.acceptance import HORIZON, Acceptance
from echo_trt.decoding.goodput.candidates import Candidates, Grammars
from echo_trt.decoding.goodput.costs import Costs
from echo_trt.decoding.goodput.ladder import DOUBT, UNDRAFTED, Ladder
from echo_trt.decoding.goodput.ngrams import NGrams
from echo_trt.decoding.goodput.requests import History
from echo_trt.decoding.goodput.search import best_portion, portions
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.planner import Copier, Draft, Explanation, Iteration, Load, Plan
from echo_trt.decoding.super_tree import SuperTree

IN_STEP = 8  # tokens that a draft in step may have to catch up with; larger: longer catch-ups count as one draft's cost
SERVES = 32  # iterations at most that a longer catch-up serves; larger: long prompts are drafted for sooner
ROOM_A_DRAFT = 8  # tokens that a request writes for an iteration that drafts for it; larger: a catch-up serves fewer
LEVELS_A_DOUBLING = 1.6  # draft levels foreseen for a doubling of a request's tokens; larger: dearer large rungs
TOKENS_A_REQUEST = 8  # the largest rung has at least as many tokens a request, and
TOKENS_A_BATCH = 64  # as many more; larger: more rungs to try
SLACK = 1.25  # nodes that are expanded for a node that pays. Larger: jagged costs are seen through, planning is slower
TIE = 1e-12  # value added per depth, so that a parent sorts before an equal child
ABOVE_PLAIN = 1e-12  # log gain of a rung that always begins above plain decoding, since the search may choose no draft


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
        grammars: Grammars | None = None,
        head: bool = True,
        budget: int = 0,
        block: int = 0,
        chain_alone: bool = False,
    ):
        """Take candidates from the draft, unless ``head`` is false, and at no cost from ``copier`` and ``ngrams``.

        grammars  of requests whose texts must fit one; it takes the copier's place while any runs

        budget       knee of the measured costs, which is only reported
        block        rows that a block drafter's only pass computes for a request; 0: the draft takes a pass a level
        chain_alone  draft a chain for a request that runs alone, since the target rounds trees differently from chains
        """
        self.name, self.settings, self.budget = name, settings, budget
        self._alone = settings.as_chain() if chain_alone else settings
        self.ngrams, self.copier = (ngrams, copier) if settings.free_candidates else (None, None)
        self.grammars = grammars if settings.free_candidates else None
        self._head, self._block = head, block
        self._horizon = settings.max_depth if block else HORIZON
        self.costs, self.acceptance = costs, acceptance
        self.history, self.ladder = History(slots), Ladder(acceptance.calibrated)
        self._serial = np.full(slots, -1)

    def plan(self, roots: np.ndarray, draft: Draft, load: Load) -> Plan:
        self._forget_departed(load)
        settings, costs, count = self._settings(load), self.costs, len(roots)
        rung = self.ladder.rung(count, lambda: self._foresee(load))
        constrained = self.grammars is not None and bool(self.grammars.constrained(load.slots).any())
        drafts = rung != UNDRAFTED
        if not drafts and not constrained:  # what a grammar forces is worth a verification by itself
            return Plan.undrafted(roots)
        size = max(rung, costs.padded(count + 1)) if drafts else costs.padded(TOKENS_A_REQUEST * count)
        fills = drafts and self._fills_rung
        copier = self.grammars if constrained else self.copier
        candidates = Candidates(
            SuperTree.from_roots(roots),
            self.acceptance,
            weights=self.history.weights(load.slots),
            room=load.room,
            copied=copier.continuations(load.slots, settings.max_depth) if copier else None,
            one_path=settings.one_path,
            ngrams=self.ngrams,
            recent=load.recent,
            max_depth=settings.max_depth,
            grammars=self.grammars if constrained else None,
            slots=load.slots,
        )
        search = Search(candidates, load, self._verifying(load, size - count, fills), self.price(load))
        if drafts and self._head and load.room.any():
            self._draft(draft, search)
        candidates.append_continuations()
        chosen = select(candidates.value, candidates.tree, settings.per_request, search.seconds, search.price)
        tree, nodes = candidates.tree.sorted_by_request(chosen)
        padded_to = costs.padding_target(len(tree), size) if fills else 0
        chances = candidates.probability
        return Plan(tree, chances[nodes], Explanation(candidates.tree, chances, nodes, size), padded_to)

    def _settings(self, load: Load) -> GoodputSettings:
        """Return how far the search may go under a load."""
        return self._alone if len(load.slots) == 1 else self.settings

    @property
    def _fills_rung(self) -> bool:
        """Whether verifications are filled to the rung: a change of size costs time here, and a draft fills it."""
        return self._head and self.costs.change > 0

    def _foresee(self, load: Load) -> tuple[np.ndarray, np.ndarray]:
        """Foresee the ladder's rungs int64 [R] and their log gains float64 [R]."""
        costs, history, count, settings = self.costs, self.history, len(load.slots), self._settings(load)
        rungs = costs.rungs(count, TOKENS_A_REQUEST * count + TOKENS_A_BATCH)
        if not self._head:
            return rungs[-1:], np.full(1, ABOVE_PLAIN)
        nodes = (rungs - count) / count  # of a request
        levels = np.minimum(np.minimum(LEVELS_A_DOUBLING * np.log2(1 + nodes), nodes), settings.max_depth)
        passes = np.minimum(levels, 1) if self._block else levels
        level = costs.draft((2 + self._block) * count, load.context) + history.level_seconds
        target = costs.target.base(int(rungs[-1]))[rungs] + costs.target.per_context * load.context
        seconds = target + costs.target.per_node * nodes * load.context + costs.cold + passes * level
        forecast = self.acceptance.forecast(settings.width)
        tokens = 1 + forecast.expected_tokens(rungs - count, count) / count
        host, plain = history.host_seconds, costs.plain(count, load.context)
        log_gains = np.log(tokens * (plain + host) / (seconds + host))
        if self._fills_rung:
            return rungs, log_gains - DOUBT
        # The search may choose any size up to the last rung, or none.
        return rungs[-1:], np.maximum(log_gains.max(keepdims=True), ABOVE_PLAIN)

    def _verifying(self, load: Load, nodes: int, fills: bool) -> np.ndarray:
        """Return the additional seconds of verifying 0, 1, ... ``nodes`` nodes: float64 [nodes + 1].

        ``fills``: the rung is filled, whatever its nodes are worth.
        """
        costs, count = self.costs, len(load.slots)
        if fills:
            return np.zeros(nodes + 1)
        number = np.arange(nodes + 1)
        seconds: np.ndarray = costs.verifications(count + load.prompt_tokens, number)
        seconds += costs.target.per_node * load.context / count * number
        seconds[1:] += 2 * costs.change  # there and back
        seconds -= seconds[0]
        return seconds

    def totals(self) -> dict[str, dict[str, float]]:
        return self.acceptance.totals()

    def gain(self) -> float | None:
        return self.ladder.gain

    def _forget_departed(self, load: Load) -> None:
        """Start afresh where another request has taken a slot."""
        for slot in load.slots[self._serial[load.slots] != load.serial].tolist():
            self.history.forget(slot)
        self._serial[load.slots] = load.serial

    def price(self, load: Load) -> float:
        """Return the tokens that a second is worth: plain decoding's rate, times what speculation has gained."""
        return self.history.speedup * self._plain_rate(load)

    def _plain_rate(self, load: Load) -> float:
        """Return the tokens a second of plain decoding."""
        count = len(load.slots)
        return count / (self.costs.plain(count, load.context) + self.history.host_seconds)

    def _draft(self, draft: Draft, search: Search) -> None:
        """Draft levels, while they pay; their nodes join the candidates."""
        candidates, load, history, settings = search.candidates, search.load, self.history, self._settings(search.load)
        history.begin(load.slots)
        requests, levels = self._choose_requests(search)
        if len(requests) == 0:
            return
        if levels:
            most = min(settings.per_request, max(16, 4 * len(search.seconds) // len(requests)))
            draft.look_ahead(levels, settings.beams, settings.width, most)
        log_q, tokens = draft.expand_roots(requests)
        candidates.add(requests, log_q, tokens, settings.width)
        best_child = candidates.best_child(requests)
        history.drafted(load.slots[requests], best_child, self.acceptance.forecast(settings.width).first)
        if self._block or levels:
            self._read_levels(draft, search)
        else:
            self._draft_levels(draft, search)

    def _choose_requests(self, search: Search) -> tuple[np.ndarray, int]:
        """Return the requests to draft for, int64 [A], ascending, and the levels to look ahead (``Draft.look_ahead``).

        Where no draft pays, that is a request to probe, if its time has come, or none.
        """
        load, history = search.load, self.history
        open_ = np.flatnonzero(load.room > 0)
        promise = np.minimum(history.promise[load.slots[open_]] * search.candidates.weights[open_], 2.0)
        best = np.argsort(-promise, kind="stable")
        behind = load.behind[open_]
        # A long catch-up, of a prompt for instance, serves those iterations that will draft, and is paid over them.
        once, serves = np.maximum(behind - IN_STEP, 0), np.clip(load.room[open_] / ROOM_A_DRAFT, 1, SERVES)
        entries = np.cumsum((behind - once + once / serves + self._block)[best])
        if load.looks_ahead:
            count, levels = self._worth_looking_ahead(search, promise[best], entries)
        else:
            count, levels = self._worth_expanding(search, promise[best], 0, entries), 0
        if count:
            return np.sort(open_[best[:count]]), levels
        alone = self.costs.cold + self.costs.draft.per_context * load.context / len(load.slots)
        entries = behind + self._block
        seconds = self.costs.draft.base(int(entries.max()))[entries] + alone
        return history.probe(open_, load.slots, seconds), 0

    def _draft_levels(self, draft: Draft, search: Search) -> None:
        """Draft further levels, a pass each, while the next one pays."""
        candidates, settings, expanded = search.candidates, self._settings(search.load), 0
        for depth in range(1, settings.max_depth):
            frontier = candidates.frontier(depth, settings.beams)
            if len(frontier) == 0:
                return
            # A pass computes the nodes above again: about in proportion to the portion of the frontier.
            entries = np.arange(1, len(frontier) + 1) * (1 + expanded / len(frontier))
            count = self._worth_expanding(search, candidates.value[frontier], depth, entries)
            if count == 0:
                return
            nodes = np.sort(frontier[:count])
            log_q, tokens = draft.expand(candidates.tree, nodes)
            candidates.add(nodes, log_q, tokens, settings.width)
            expanded += count

    def _read_levels(self, draft: Draft, search: Search) -> None:
        """Grow trees from levels that were drafted at once; a node too unlikely to be verified is not expanded."""
        candidates, settings = search.candidates, self._settings(search.load)
        for depth in range(1, settings.max_depth):
            paying = paying_nodes(candidates.value[candidates.tree.num_requests :], search.seconds, search.price)
            nodes = candidates.promising(depth, min(int(SLACK * paying) + 1, len(search.seconds) - 1))
            if len(nodes) == 0:
                return
            log_q, tokens = draft.expand(candidates.tree, nodes)
            candidates.add(nodes, log_q, tokens, settings.width)

    def _worth_expanding(self, search: Search, frontier: np.ndarray, depth: int, entries: np.ndarray) -> int:
        """Return the number of frontier nodes to expand; 0 stops drafting.

        frontier float64 [F]: values in tokens, best first. entries float64 [F]: tokens of the draft pass that expands
        the first 1, 2, ... nodes.
        """
        forecast = self.acceptance.forecast(self._settings(search.load).width, self._horizon)
        if depth >= len(forecast.child_shares):
            return 0
        passes = self._passes(search, entries, portions(len(frontier)))
        levels = forecast.child_shares[depth], forecast.added_tokens[depth]
        return self._best_portion(search, frontier, depth, passes, levels, self._block > 0)[0]

    def _worth_looking_ahead(self, search: Search, frontier: np.ndarray, entries: np.ndarray) -> tuple[int, int]:
        """Return the number of requests to draft for, and levels below the roots' children to draft with them.

        frontier, entries  as of ``_worth_expanding``, of the roots
        """
        settings = self._settings(search.load)
        forecast = self.acceptance.forecast(settings.width, settings.max_depth)
        ends = portions(len(frontier))
        passes, best = np.zeros(len(ends)), (0, 0.0, 0)
        for level in range(len(forecast.child_shares[0])):
            rows = np.arange(1, len(frontier) + 1) * float(settings.beams * level)
            passes = passes + self._passes(search, rows if level else entries, ends)
            levels = forecast.child_shares[0][: level + 1], forecast.added_tokens[0][: level + 1]
            count, net = self._best_portion(search, frontier, 0, passes, levels, True)
            if net > best[1]:
                best = count, net, level
        return best[0], best[2]

    def _passes(self, search: Search, entries: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the seconds of a draft pass of ``entries`` float64 [F] for each of the portions ``ends``."""
        costs, load = self.costs, search.load
        base = costs.draft.base(int(entries[-1]) + 1)[entries[ends - 1].astype(np.int64)]
        seconds: np.ndarray = base + costs.draft.per_context * load.context * np.minimum(ends / len(load.slots), 1.0)
        return seconds

    def _best_portion(
        self,
        search: Search,
        frontier: np.ndarray,
        depth: int,
        passes: np.ndarray,
        levels: tuple[np.ndarray, np.ndarray],
        one_pass: bool,
    ) -> tuple[int, float]:
        """See ``search.best_portion``; ``passes``: seconds of a level, or of all."""
        candidates, price = search.candidates, search.price
        chains = candidates.continuations()
        count, net = best_portion(
            frontier,
            portions(len(frontier)),
            price * (passes + self.history.level_seconds),
            price * self.costs.cold if depth == 0 else 0.0,
            *levels,
            candidates.value[candidates.tree.num_requests :],
            chains.probability * candidates.weights[chains.request],
            candidates.tree.depth[chains.leaf] == depth,
            price * search.seconds,
            one_pass,
        )
        return int(count), float(net)

    def observe(self, iteration: Iteration) -> None:
        plan, load, history = iteration.plan, iteration.load, self.history
        for number, done in enumerate(iteration.drafts):
            self.costs.observe_draft(done.tokens, done.context, done.seconds, first=number == 0)
        history.decided(min(iteration.levels, 1) if self._block else iteration.levels, iteration.planning)
        target, prompts = iteration.target, load.prompt_tokens
        self.costs.observe_target(target.tokens, target.context, target.seconds, target.node_context, prompts)
        tree, count = plan.tree, len(load.slots)
        drafted, accepted = np.flatnonzero(tree.parent >= 0), np.zeros(len(tree))
        accepted[iteration.path] = 1
        self.acceptance.observe(
            tree.source[drafted],
            tree.depth[drafted],
            tree.score[drafted],
            plan.probability[drafted],
            accepted[drafted],
        )
        self.acceptance.elapsed(iteration.seconds)
        history.observe(load.slots, np.bincount(tree.request[iteration.path], minlength=count), iteration.seconds)
        if prompts == 0 and count:
            # Accepted tokens are too few in a trial to count.
            drafts = history.corrected_expectation(plan.probability.sum() - count, len(iteration.path) - count)
            plain = self._plain_rate(load) * iteration.seconds
            history.spent(count + drafts, plain, iteration.host)
            self.ladder.observe(count + drafts, iteration.seconds)


@dataclass(frozen=True)
class Search:
    """The candidates and prices of one iteration.

    candidates  nodes that may be verified, so far
    seconds     float64 [n], additional seconds of verifying 0, 1, ..., n - 1 nodes
    price       tokens that a second is worth
    """

    candidates: Candidates
    load: Load
    seconds: np.ndarray
    price: float


def paying_nodes(value: np.ndarray, seconds: np.ndarray, price: float) -> int:
    """Return how many of the best nodes pay for their verification.

    A node beyond them will not pay later either, where the cost of a node grows with their number: further candidates
    only come before it.

    value float64 [n], in tokens. seconds, price: as of ``select``
    """
    best = np.sort(value)[::-1][: len(seconds) - 1]
    return int((np.append(0.0, np.cumsum(best)) - price * seconds[: len(best) + 1]).argmax())


def select(value: np.ndarray, tree: SuperTree, per_request: int, seconds: np.ndarray, price: float) -> np.ndarray:
    """Choose the nodes to verify, roots among them: the best number of the best nodes, int64, ascending.

    value float64 [n] only falls along a path, so that the best k are ancestor-closed for every k. seconds float64
    [n - B + 1]: the target's pass with 0, 1, ... nodes more than roots, at least as far as they can pay; jagged, so
    every k is tried.
    """
    roots = tree.num_requests
    nodes = roots + np.flatnonzero(value[roots:] > 0)
    order = TIE * tree.depth[nodes] - value[nodes]  # a child may be worth exactly what its parent is, and comes after
    # As many as may cost no more than all together are worth: of a large batch few, and the others need no sorting.
    most = np.flatnonzero(price * (seconds - seconds[0]) <= value[nodes].sum())[-1]
    if most < len(nodes):
        best = np.flatnonzero(order <= np.partition(order, most)[most])
        if np.bincount(tree.request[nodes[best]], minlength=1).max() < per_request:
            nodes, order = nodes[best], order[best]
    nodes = tree.best_first(nodes, -order, np.full(roots, per_request - 1))[: len(seconds) - 1]
    worth = np.append(0.0, np.cumsum(value[nodes])) - price * seconds[: len(nodes) + 1]
    return np.concatenate((np.arange(roots), np.sort(nodes[: worth.argmax()])))
