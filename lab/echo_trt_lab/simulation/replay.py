"""Replays recorded trees: a policy's code plans the iterations, and a clock adds up the seconds of its passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from echo_trt.backends.cuda.sizes import bucket
from echo_trt.engine.drafters.levels import device_work
from echo_trt.errors import UserError, described, raised_at
from echo_trt.speculation.accept import accept
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.drafts import Pass, Proposals, TimedDraft
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.pacer import Pace
from echo_trt.speculation.pack import LevelShape
from echo_trt.speculation.planner import RECENT, ChainSource, Iteration, Plan, Planner, StepContext
from echo_trt.speculation.super_tree import SuperTree
from echo_trt_lab.bootstrap import pooled
from echo_trt_lab.calibration.observe import recorded_chains
from echo_trt_lab.calibration.trees import RecordedDraft
from echo_trt_lab.simulation.machines import DeviceCosts, Machine
from echo_trt_lab.simulation.walk import BEYOND, Kept, Walk

WARM_UP = 40  # iterations before those that count; larger: a policy has learnt more when it is measured


@contextmanager
def naming_failures(policy: str) -> Iterator[None]:
    """Tell in a sentence where a policy, which may be anybody's file, fails."""
    try:
        yield
    except Exception as error:
        reason = f"{described(error)}, at {raised_at(error)}"
        raise UserError(f"policy is {policy}, which fails ({reason}); fix it.") from error


@dataclass(frozen=True)
class Step:
    """Results of one iteration; ``kept`` is emitted by the slots, ``levels`` counts draft passes."""

    kept: Kept
    verified: int
    accepted: int
    levels: int
    seconds: float

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of the running slots: int [B]."""
        return self.kept.tokens


COUNTS = ("iterations", "verified", "accepted", "levels", "seconds")


@dataclass
class Tally:
    """Sums over iterations.

    progress   int64 [B], the slots' tokens
    by_answer  answer -> its tokens, and its share of the seconds in which it was walked
    """

    progress: np.ndarray
    iterations: int = 0
    verified: int = 0
    accepted: int = 0
    levels: int = 0
    seconds: float = 0.0
    by_answer: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, step: Step) -> None:
        share = step.seconds / max(len(step.tokens), 1)
        for answer, count in zip(step.kept.answers.tolist(), step.tokens.tolist(), strict=True):
            tokens, seconds = self.by_answer.get(answer, (0.0, 0.0))
            self.by_answer[answer] = tokens + count, seconds + share
        self.progress += step.tokens
        self.iterations += 1
        self.verified += step.verified
        self.accepted += step.accepted
        self.levels += step.levels
        self.seconds += step.seconds

    def __add__(self, other: Tally) -> Tally:
        sums = [getattr(self, name) + getattr(other, name) for name in ("progress", *COUNTS)]
        return Tally(*sums, pooled((self.by_answer, other.by_answer)))

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

    def __init__(
        self, draft: RecordedDraft, walk: Walk, costs: Costs, block: int = 0, device: DeviceCosts | None = None
    ):
        super().__init__(clock=lambda: self._now)
        self._now, self._draft, self._walk, self._costs, self._block = 0.0, draft, walk, costs, block
        self._expanded, self._device = np.zeros(0, np.int64), device

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        self._pass(self._catch_up(requests) + self._block * len(requests))
        return self._draft.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        if not self._block:
            running = np.zeros(tree.num_requests, bool)
            running[tree.request[nodes]] = True
            self._pass(int(running[tree.request[self._expanded]].sum()) + len(nodes))
            self._expanded = np.concatenate((self._expanded, nodes))
        return self._draft.expand(tree, nodes)

    def _catch_up(self, requests: np.ndarray) -> int:
        """Return the missing entries of ``requests``, which are not missing any more."""
        slots = self._walk.running[requests]
        lag = int(self._walk.draft_lag[slots].clip(1).sum())
        self._walk.draft_lag[slots] = 0
        return lag

    def _pass(self, *tokens: int, launches: int = 1) -> None:
        """Let passes of so many ``tokens`` run without a wait between them."""
        context = int(self._walk.context.sum())
        self._now += self._costs.cold if not self.passes else 0.0
        self._now += self._device.seconds(launches) if self._device else 0.0
        for entries in tokens:
            self._now += self._costs.draft(entries, context)
            self.ran(entries, context)


class DeviceDraft(ClockedDraft):
    """A draft on a device: what it computes, and how often the host waits, are counted as the drafter counts them.

    All recorded children of a node are proposed, though a device returns the best ones of a request alone.
    """

    looks_ahead = True
    _ahead: tuple[int, int, int] | None = None  # depth, beams and width that were asked for, and have not run yet
    _depth = 0  # of the drafted trees; 0: the planner did not look ahead

    def look_ahead(self, depth: int, beams: int, width: int, maximum: int) -> None:
        self._ahead = depth, min(beams, width), width

    def propose_roots(self, requests: np.ndarray) -> Proposals:
        if not self._ahead:
            return super().propose_roots(requests)
        self._levels(len(requests), self._catch_up(requests))
        return self._draft.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        if not self._depth:
            return super().propose(tree, nodes)
        if self._ahead:
            self._levels(len(np.unique(tree.request[nodes])))
        log_q, tokens = self._draft.expand(tree, nodes)
        log_q[tree.depth[nodes] >= self._depth] = -np.inf  # what was not drafted
        return log_q, tokens

    def _levels(self, requests: int, lag: int = 0) -> None:
        assert self._ahead is not None
        assert self._device is not None
        first, (depth, beams, width) = max(self._depth, 1), self._ahead
        work = device_work(requests, LevelShape(first, depth - first, beams, width), bucket, lag, self._device.sizes)
        self._pass(*work.tokens, launches=work.launches)
        self._ahead, self._depth = None, depth


class RecordedCopies(ChainSource):
    """A source that proposes the text that was copied at a walk's positions."""

    def __init__(self, walk: Walk, lookup: list[float], length: int):
        """Copy along ``walk``, ``length`` tokens; ``lookup``: P(accept) of one after a match of 1, 2, ... tokens."""
        self._walk, self._lookup, self._length = walk, lookup, length

    def propose(self, load: StepContext) -> Chains:
        walk = self._walk
        return recorded_chains(walk.recording.trees, walk.positions_of(load.slots), self._lookup, self._length)


class Replay:
    """One planner over one walk; ``step`` is the iteration of engine/core.py without engines.

    block  rows of a block drafter's only pass for a request; 0: the draft takes one pass per level
    """

    def __init__(self, walk: Walk, machine: Machine, planner: Planner, block: int = 0):
        self.walk, self.planner, self._block = walk, planner, block
        self._machine, self._clock, self._size = machine, machine.costs(), 0
        searches = isinstance(planner, GoodputPlanner)
        self._candidate_seconds = machine.candidate_seconds if searches else machine.node_seconds
        self._draft = DeviceDraft if machine.device and not block else ClockedDraft

    def run(self, tokens: int) -> Tally:
        """Warm up a planner that learns, then iterate from the beginning until ``tokens`` are committed."""
        learns = type(self.planner).observe is not Planner.observe
        for _ in range(WARM_UP * learns):
            self.step()
        self.walk.restart()  # every policy is measured on the same texts
        tally = Tally(np.zeros(self.walk.batch, np.int64))
        while tally.tokens < tokens:
            tally.add(self.step())
        return tally

    def step(self, prompt_tokens: int = 0, prompt_context: int = 0, pace: Pace | None = None) -> Step:
        """Iterate over the running slots, beside ``prompt_tokens`` of prompts with ``prompt_context`` cached tokens."""
        walk, slots, trees = self.walk, self.walk.running, self.walk.recording.trees
        batch, positions, context = len(slots), walk.positions, int(walk.context.sum())
        max_draft_len, recent = walk.max_draft_len.clip(0), walk.recent(RECENT)
        draft_lag, epoch = walk.draft_lag[slots].clip(1), walk.epoch[slots]
        load = StepContext(slots, max_draft_len, draft_lag, context, recent, epoch, prompt_tokens, pace)
        known, device = RecordedDraft(trees, positions), self._machine.device
        draft = self._draft(known, walk, self._clock, self._block, device)
        with naming_failures(self.planner.name):
            plan = self.planner.plan(walk.roots, draft, load) if batch else Plan.undrafted(walk.roots)
        tree = plan.tree
        candidates = len(plan.explanation.candidates)
        levels = draft.levels
        planning = levels * self._machine.level_seconds + candidates * self._candidate_seconds
        again = int(((tree.sizes - 1) * walk.context).sum())
        padded_to = 0 if prompt_tokens else plan.padded_to
        target = self._verification(max(len(tree) + prompt_tokens, padded_to), context + prompt_context, again)
        path, _ = accept(tree, lambda nodes: self._next_token(positions[tree.request[nodes]], tree.depth[nodes] + 1))
        host = self._machine.host_seconds
        seconds = draft.seconds + planning + target.seconds + host
        passes = tuple(draft.passes)
        with naming_failures(self.planner.name):
            self.planner.observe(Iteration(plan, load, path, target, passes, levels, planning, seconds, host))
        kept = walk.advance(np.bincount(tree.request[path], minlength=batch))
        return Step(kept, len(tree) - batch, len(path) - batch, len(passes), seconds)

    def _verification(self, tokens: int, context: int, again: int) -> Pass:
        """Time the target's pass; ``again``: cached tokens that draft nodes attend."""
        clock = self._clock
        padded = clock.padded(tokens) if again else clock.padded_undrafted(tokens)
        seconds = clock.target(padded, context) + clock.target.per_node * again
        seconds += self._machine.device.seconds(1) if self._machine.device else 0.0
        seconds += clock.change if padded != self._size else 0.0
        self._size = padded
        return Pass(tokens, context, seconds, again)

    def _next_token(self, positions: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        tokens = self.walk.recording.trees.truth(positions, ahead).astype(np.int64)
        return np.where(tokens >= 0, tokens, BEYOND)
