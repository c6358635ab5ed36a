"""Replay: a policy's own code decides over recorded trees, and a clock adds up what its passes would take."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from echo_trt.calibration.fit import continuations
from echo_trt.calibration.store import Calibration
from echo_trt.calibration.trees import RecordedDraft
from echo_trt.decoding.accept import accept
from echo_trt.decoding.allocate import allocate
from echo_trt.decoding.costs import Costs
from echo_trt.decoding.goodput import Goodput, Load, Plan, Planner
from echo_trt.decoding.grow import grow
from echo_trt.decoding.ngrams import NGrams
from echo_trt.decoding.policies import Policy
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.simulation.machines import Machine
from echo_trt.simulation.walk import BEYOND, Recording, Walk

WARM_UP = 40  # iterations in which a policy learns, before those that count


@dataclass(frozen=True)
class Step:
    """One iteration: tokens of each slot [B]; draft nodes verified and accepted; draft passes; seconds."""

    tokens: np.ndarray
    verified: int
    accepted: int
    levels: int
    seconds: float


@dataclass
class Tally:
    """Sums over iterations; ``progress`` [B] are each slot's tokens."""

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


@dataclass
class ClockedDraft:
    """A Draft over recorded trees. Its passes take along what the runtime's do: a root's missing entries, and deeper
    the nodes of the same requests that were expanded before."""

    draft: RecordedDraft
    walk: Walk
    costs: Costs
    planner: Planner | None
    seconds: float = 0.0
    passes: int = 0
    entries: int = 0
    _expanded: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._pass(int(self.walk.behind[requests].clip(1).sum()))
        self.walk.behind[requests] = 0
        return self.draft.expand_roots(requests)

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        running = np.zeros(tree.num_requests, bool)
        running[tree.request[nodes]] = True
        self._pass(int(running[tree.request[self._expanded]].sum()) + len(nodes))
        self._expanded = np.concatenate((self._expanded, nodes))
        return self.draft.expand(tree, nodes)

    def _pass(self, entries: int) -> None:
        first, context = self.passes == 0, int(self.walk.context.sum())
        self.entries = entries
        taken = self.costs.draft(entries, context) + first * self.costs.cold
        self.seconds += taken
        self.passes += 1
        if self.planner:
            self.planner.draft_pass(entries, context, taken, first)


class Replay:
    """One policy at one batch: ``step`` is runtime/loop.py's iteration without engines."""

    def __init__(
        self,
        recording: Recording,
        calibration: Calibration,
        machine: Machine,
        policy: Policy,
        batch: int,
        prompt: int,
        ngrams: NGrams | None = None,
    ):
        self._recording, self._policy, self._prompt, self._batch = recording, policy, prompt, batch
        self._machine, self._clock, self._size = machine, machine.costs(), 0
        self._lookup = calibration.lookup if policy.copies else None
        self.planner: Goodput | None = None
        if policy.seeks_goodput:
            self.planner = Goodput(machine.costs(), calibration.model(), batch, ngrams)
        self.walk = Walk(recording, batch, prompt)

    def run(self, tokens: int) -> Tally:
        """Iterate from the beginning until ``tokens`` are committed, once a policy that learns has warmed up."""
        if self.planner:
            for _ in range(WARM_UP):
                self.step()
        self.restart()
        tally = Tally(np.zeros(self._batch, np.int64))
        while tally.tokens < tokens:
            tally.add(self.step())
        return tally

    def restart(self) -> None:
        """All requests of the beginning again: every policy is measured on the same texts."""
        self.walk = Walk(self._recording, self._batch, self._prompt)
        self._join(np.arange(self._batch))

    def step(self) -> Step:
        walk = self.walk
        positions, context = walk.positions, int(walk.context.sum())
        ngrams = self.planner.ngrams if self.planner else None
        recent = None if ngrams is None else walk.recent(ngrams.longest)
        load = Load(np.arange(self._batch), walk.room.clip(0), walk.behind.clip(1), context, recent=recent)
        draft = ClockedDraft(self._draft_at(positions), walk, self._clock, self.planner)
        plan = self._plan(positions, draft, load)
        tree, planning = plan.tree, draft.passes * self._machine.level_seconds
        if self.planner:
            planning += len(plan.candidates) * self._machine.candidate_seconds
        again = int(((tree.sizes - 1) * walk.context).sum())
        tokens = max(len(tree), plan.fill)
        taken = self._verification(tokens, context, again)
        path, _ = accept(tree, lambda nodes: self._next_token(positions[tree.request[nodes]], tree.depth[nodes] + 1))
        seconds = draft.seconds + planning + taken + self._machine.host_seconds
        if self.planner:
            self.planner.decided(draft.passes, planning)
            self.planner.target_pass(tokens, context, taken, again)
            self.planner.committed(plan, path, load, seconds, self._machine.host_seconds)
        kept = walk.advance(np.bincount(tree.request[path], minlength=self._batch))
        self._join(kept.ended)
        return Step(kept.tokens, len(tree) - self._batch, len(path) - self._batch, draft.passes, seconds)

    def _verification(self, tokens: int, context: int, again: int) -> float:
        """Seconds of the target's pass; ``again``: cached tokens that nodes attend, roots apart."""
        clock = self._clock
        if again:
            tokens += -tokens % clock.granule
        tokens = max(tokens, clock.least)
        changed, self._size = tokens != self._size, tokens
        return clock.target(tokens, context) + clock.target.per_node * again + changed * clock.change

    def _plan(self, positions: np.ndarray, draft: ClockedDraft, load: Load) -> Plan:
        roots, policy = self.walk.roots, self._policy
        if self.planner:
            copied = self._lookup and continuations(self._recording.trees, positions, self._lookup, policy.max_depth)
            return self.planner.plan(roots, draft, policy, load, copied)
        candidates, reach = grow(roots, draft, policy, load.room)
        tree, _ = candidates.sorted_by_request(allocate(candidates, reach, policy))
        return Plan(tree, np.exp(tree.score.astype(np.float64)), candidates)

    def _draft_at(self, positions: np.ndarray) -> RecordedDraft:
        return RecordedDraft(self._recording.trees, positions, self._recording.width)

    def _next_token(self, positions: np.ndarray, ahead: np.ndarray) -> np.ndarray:
        tokens = self._recording.trees.truth(positions, ahead).astype(np.int64)
        return np.where(tokens >= 0, tokens, BEYOND)

    def _join(self, slots: np.ndarray) -> None:
        if self.planner:
            for slot in slots:
                self.planner.joined(int(slot))
