"""Replays recorded trees: a policy's code plans the iterations, and a clock adds up the seconds of its passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.accept import accept
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.drafts import Pass, Proposals, TimedDraft
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.planner import RECENT, Iteration, Planner, StepContext
from echo_trt.speculation.super_tree import SuperTree
from echo_trt_lab.calibration.observe import recorded_chains
from echo_trt_lab.calibration.trees import RecordedDraft
from echo_trt_lab.simulation.machines import Machine
from echo_trt_lab.simulation.walk import BEYOND, Walk

WARM_UP = 40  # iterations before those that count; larger: a policy has learnt more when it is measured


@dataclass(frozen=True)
class Step:
    """Results of one iteration; ``tokens``, int [B], are emitted by the slots, ``levels`` counts draft passes."""

    tokens: np.ndarray
    verified: int
    accepted: int
    levels: int
    seconds: float


@dataclass
class Tally:
    """Sums over iterations; ``progress``, int64 [B], are the slots' tokens."""

    progress: np.ndarray
    iterations: int = 0
    verified: int = 0
    accepted: int = 0
    levels: int = 0
    seconds: float = 0.0

    def add(self, step: Step) -> None:
        self.progress += step.tokens
        self.iterations += 1
        self.verified += step.verified
        self.accepted += step.accepted
        self.levels += step.levels
        self.seconds += step.seconds

    @property
    def tokens(self) -> int:
        return int(self.progress.sum())

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def figures(self) -> dict[str, float | None]:
        batch, count = len(self.progress), self.iterations
        return {
            "tokens_per_s": round(self.rate, 3),
            "accepted_length": round(self.tokens / (batch * count), 4),
            "draft_utilisation": round(self.accepted / self.verified, 4) if self.verified else None,
            "verified_per_iteration": round(batch + self.verified / count, 3),
            "draft_levels_per_iteration": round(self.levels / count, 3),
            "iteration_ms": round(1e3 * self.seconds / count, 4),
            "progress_spread": round(float(self.progress.std() / self.progress.mean()), 4),
            "iterations": count,
        }


class ClockedDraft(TimedDraft):
    """A draft over recorded trees, on a clock of its own that adds up what passes cost.

    A first pass has a root's missing entries, and a later one also the nodes of its requests that were expanded before,
    as in the runtime. A block drafter's first pass also has ``block`` rows per request, and there is no later one.
    """

    def __init__(self, draft: RecordedDraft, walk: Walk, costs: Costs, block: int = 0):
        super().__init__(clock=lambda: self._now)
        self._now, self._draft, self._walk, self._costs, self._block = 0.0, draft, walk, costs, block
        self._expanded = np.zeros(0, np.int64)

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        self._pass(int(self._walk.draft_lag[requests].clip(1).sum()) + self._block * len(requests))
        self._walk.draft_lag[requests] = 0
        return self._draft.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        if not self._block:
            running = np.zeros(tree.num_requests, bool)
            running[tree.request[nodes]] = True
            self._pass(int(running[tree.request[self._expanded]].sum()) + len(nodes))
            self._expanded = np.concatenate((self._expanded, nodes))
        return self._draft.expand(tree, nodes)

    def _pass(self, entries: int) -> None:
        context = int(self._walk.context.sum())
        self._now += self._costs.draft(entries, context) + (self._costs.cold if not self.passes else 0.0)
        self.ran(entries, context)


class RecordedCopier:
    """A copier that returns the text that was copied at a walk's positions."""

    def __init__(self, walk: Walk, lookup: list[float]):
        """Copy along ``walk``; ``lookup``: P(a copied token is accepted) after matches of 1, 2, ... tokens."""
        self._walk, self._lookup = walk, lookup

    def chains(self, slots: np.ndarray, length: int) -> Chains:
        walk = self._walk
        return recorded_chains(walk.recording.trees, walk.positions[slots], self._lookup, length)


class Replay:
    """One planner over one walk; ``step`` is the iteration of runtime/loop.py without engines.

    block  rows of a block drafter's only pass for a request; 0: the draft takes one pass per level
    """

    def __init__(self, walk: Walk, machine: Machine, planner: Planner, block: int = 0):
        self.walk, self.planner, self._block = walk, planner, block
        self._machine, self._clock, self._size = machine, machine.costs(), 0
        self._candidate_seconds = machine.candidate_seconds if isinstance(planner, GoodputPlanner) else 0.0

    def run(self, tokens: int) -> Tally:
        """Warm up, then iterate from the beginning until ``tokens`` are committed."""
        for _ in range(WARM_UP):
            self.step()
        self.walk.restart()  # every policy is measured on the same texts
        tally = Tally(np.zeros(self.walk.batch, np.int64))
        while tally.tokens < tokens:
            tally.add(self.step())
        return tally

    def step(self) -> Step:
        walk, batch, trees = self.walk, self.walk.batch, self.walk.recording.trees
        positions, context = walk.positions, int(walk.context.sum())
        max_draft_len, draft_lag, recent = walk.max_draft_len.clip(0), walk.draft_lag.clip(1), walk.recent(RECENT)
        load = StepContext(np.arange(batch), max_draft_len, draft_lag, context, recent=recent, epoch=walk.epoch.copy())
        draft = ClockedDraft(RecordedDraft(trees, positions, walk.recording.width), walk, self._clock, self._block)
        plan = self.planner.plan(walk.roots, draft, load)
        tree = plan.tree
        candidates = len(plan.explanation.candidates)
        levels = len(draft.passes)
        planning = levels * self._machine.level_seconds + candidates * self._candidate_seconds
        again = int(((tree.sizes - 1) * walk.context).sum())
        target = self._verification(max(len(tree), plan.padded_to), context, again)
        path, _ = accept(tree, lambda nodes: self._next_token(positions[tree.request[nodes]], tree.depth[nodes] + 1))
        host = self._machine.host_seconds
        seconds = draft.seconds + planning + target.seconds + host
        passes = tuple(draft.passes)
        self.planner.observe(Iteration(plan, load, path, target, passes, levels, planning, seconds, host))
        kept = walk.advance(np.bincount(tree.request[path], minlength=batch))
        return Step(kept.tokens, len(tree) - batch, len(path) - batch, levels, seconds)

    def _verification(self, tokens: int, context: int, again: int) -> Pass:
        """Time the target's pass; ``again``: cached tokens that draft nodes attend."""
        clock = self._clock
        padded = clock.padded(tokens) if again else clock.padded_undrafted(tokens)
        seconds = clock.target(padded, context) + clock.target.per_node * again
        seconds += clock.change if padded != self._size else 0.0
        self._size = padded
        return Pass(tokens, context, seconds, again)

    def _next_token(self, positions: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        tokens = self.walk.recording.trees.truth(positions, ahead).astype(np.int64)
        return np.where(tokens >= 0, tokens, BEYOND)
