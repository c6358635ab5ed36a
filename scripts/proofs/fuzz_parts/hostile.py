"""What is hostile to the core: an engine that fails, and a policy that raises or whose plans cannot be verified."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.pacer import Seats
from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.planner import Explanation, Iteration, Plan, Planner, StepContext
from echo_trt.speculation.super_tree import SuperTree


class Flaky(Engine):
    """An engine that fails before a pass, amid it or behind it, and calls back meanwhile or not. ``failed``: passes."""

    def __init__(self, engine: Engine, draw: random.Random):
        self.num_blocks, self.failed = engine.num_blocks, 0
        self.compact_kv, self.kv_block = engine.compact_kv, engine.kv_block
        self._engine, self._draw, self._overlaps = engine, draw, draw.random() < 0.5
        self._meanwhile: Callable[[], object] = bool

    def overlap(self, work: Callable[[], None]) -> bool:
        self._meanwhile = work if self._overlaps else bool
        return self._overlaps

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        for work in (self._meanwhile, lambda: outputs.update(self._engine.run(call, **inputs)), bool):
            if self._draw.random() < 0.01:
                self.failed += 1
                raise RuntimeError("the engine is unwell")
            work()
        return outputs


def _grown(plan: Plan, parents: np.ndarray, tokens: np.ndarray) -> Plan:
    """Return the plan with further nodes: the first hangs under its parent, and -1 is the node before."""
    tree = SuperTree(**vars(plan.tree))
    for parent, token in zip(parents, tokens, strict=True):
        above = np.array([parent if parent >= 0 else len(tree) - 1])
        tree.add(above, np.array([token]), np.zeros(1))
    tree, _ = tree.sorted_by_request(np.arange(len(tree)))
    chances = np.full(len(tree), 0.9)
    return Plan(tree, chances, Explanation(tree, chances, np.arange(len(tree))))


def _chain(plan: Plan, root: int, length: int) -> Plan:
    return _grown(plan, np.array([root, *[-1] * (length - 1)]), 5 + np.arange(length) % 200)


def _oversized(plan: Plan, root: int, load: StepContext) -> Plan:
    return _chain(plan, root, 150)


def _wide(plan: Plan, root: int, load: StepContext) -> Plan:
    return _grown(plan, np.full(200, root), 5 + np.arange(200))


def _twins(plan: Plan, root: int, load: StepContext) -> Plan:
    return _grown(plan, np.full(4, root), np.array([7, 7, 9, 9]))


def _too_deep(plan: Plan, root: int, load: StepContext) -> Plan:
    return _chain(plan, root, int(load.max_draft_len[plan.tree.request[root]]) + 1)


def _wrong_depth(plan: Plan, root: int, load: StepContext) -> Plan:
    plan = _chain(plan, root, 2)
    return replace(plan, tree=replace(plan.tree, depth=plan.tree.depth * 2))


def _unsorted(plan: Plan, root: int, load: StepContext) -> Plan:
    tree = _chain(plan, root, 2).tree
    backwards = np.arange(len(tree))[::-1]
    parent = np.where(tree.parent >= 0, len(tree) - 1 - tree.parent, -1)[backwards]
    kept = {name: getattr(tree, name)[backwards] for name in ("token", "request", "depth", "score", "source")}
    tree = SuperTree(**kept, parent=parent, num_requests=tree.num_requests)
    return replace(plan, tree=tree, probability=np.ones(len(tree)))


def _not_a_number(plan: Plan, root: int, load: StepContext) -> Plan:
    score = np.full_like(plan.tree.score, np.nan)
    return replace(plan, tree=replace(plan.tree, score=score), probability=plan.probability * np.nan)


LIES = (_oversized, _wide, _twins, _too_deep, _wrong_depth, _unsorted, _not_a_number)


class Hostile(Planner):
    """A policy that asks another one, and now and then raises, or hands on a plan that cannot be verified."""

    name = "hostile"

    def __init__(self, planner: Planner, draw: random.Random, often: float = 0.3):
        self._planner, self._draw, self._often = planner, draw, often

    def _fails(self, where: str) -> None:
        if self._draw.random() < self._often / 4:
            raise self._draw.choice((ValueError, IndexError, ZeroDivisionError, KeyError))(f"the policy's {where}")

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        self._fails("plan")
        plan = self._planner.plan(roots, draft, load)
        drafted = np.flatnonzero((plan.tree.parent < 0) & (load.max_draft_len[plan.tree.request] > 0))
        if len(drafted) == 0 or self._draw.random() > self._often:
            return plan
        return self._draw.choice(LIES)(plan, int(self._draw.choice(drafted.tolist())), load)

    def admit(self, seats: Seats) -> Seats:
        self._fails("admit")
        return self._planner.admit(seats)

    def observe(self, iteration: Iteration) -> None:
        self._fails("observe")
        self._planner.observe(iteration)

    def __getattribute__(self, name: str) -> Any:
        """Answer all else as the other one does."""
        if name in ("budget", "level_shapes", "totals", "gain"):
            return getattr(object.__getattribute__(self, "_planner"), name)
        return object.__getattribute__(self, name)
