"""Goodput over a block drafter: best-first trees of the whole batch, and a pass that is weighed once."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import Recorded, linear, load_of
from seeded_draft import NoDraft, PathDraft, SteadyDraft, drafted

from echo_trt.speculation.goodput.ladder import ForecastGains, Ladder
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED_START, Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings

ROWS = 6
SHAPE = GoodputSettings(max_depth=ROWS, beams=1, width=4, per_request=30)


class Marginals(PathDraft):
    """A block: the children of every node of a depth have the same probabilities, q float [B, ROWS, k]."""

    def __init__(self, q: np.ndarray):
        super().__init__()
        self.q = q

    def children(self, request: int, path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        _, rows, k = self.q.shape
        inside = len(path) < rows
        log_q = np.log(self.q[request, len(path)]) if inside else np.full(k, -np.inf)
        return log_q.astype(np.float32), np.arange(k)


class Fixed(Ladder):
    def __init__(self, size: int):
        super().__init__()
        self._size = size

    def size(self, requests: int, forecast: ForecastGains, priced: bool = False) -> int:
        return self._size


def planner_of(target: Curve, draft: Curve, count: int, change: float = 0.0, **changes) -> GoodputPlanner:
    settings = GoodputSettings(**vars(SHAPE) | changes)
    costs = Costs(target, draft, change=change)
    return GoodputPlanner(
        "goodput", settings, costs, Acceptance.uncalibrated(ROWS, CALIBRATED_START), count, block=ROWS
    )


def best_first(q: np.ndarray, nodes: int) -> set[tuple[int, tuple[int, ...]]]:
    """DDTree (arXiv 2604.12989) over a batch: take the likeliest path and put its children into the heap."""
    taken: set[tuple[int, tuple[int, ...]]] = set()
    heap = [(-p, i, (j,)) for i in range(len(q)) for j, p in enumerate(q[i, 0])]
    heapq.heapify(heap)
    while heap and len(taken) < nodes:
        value, request, path = heapq.heappop(heap)
        taken.add((request, path))
        if len(path) < q.shape[1]:
            for j, p in enumerate(q[request, len(path)]):
                heapq.heappush(heap, (value * p, request, (*path, j)))
    return taken


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 24))
def test_trees_are_the_best_first_ones_of_the_whole_batch(seed, count, nodes):
    q = np.sort(np.random.default_rng(seed).dirichlet(np.full(6, 0.5), (count, ROWS)))[..., ::-1][..., :4]
    q = np.maximum(q, 1e-4)
    planner = planner_of(linear(1.0, 0.0), linear(1e-6, 0.0), count, change=1.0)
    planner.ladder = Fixed(count + nodes)
    draft = Recorded(Marginals(q))
    plan = planner.plan(np.zeros(count), draft, load_of(count))
    got = {(int(plan.tree.request[n]), drafted(plan.tree, n)) for n in range(len(plan.tree))} - {
        (i, ()) for i in range(count)
    }
    wanted = best_first(q, nodes)

    def worth(chosen) -> list[float]:
        return sorted(float(np.prod([q[i, d, j] for d, j in enumerate(path)])) for i, path in chosen)

    assert len(got) == len(wanted)
    np.testing.assert_allclose(worth(got), worth(wanted), rtol=1e-4)  # among equals any may be taken


def test_levels_go_on_to_the_blocks_last_row():
    """A sure block is one chain of all its rows, though a search of two levels ahead would not see that far."""
    q = np.full((1, ROWS, 1), 0.99)
    planner = planner_of(linear(1.0, 0.01), linear(0.5, 0.0), 1)
    planner.ladder = Fixed(20)
    plan = planner.plan(np.zeros(1), Marginals(q), load_of(1))
    assert plan.tree.depth.max() == ROWS
    assert plan.probability[-1] == pytest.approx(0.99**ROWS, rel=0.05)


@pytest.mark.parametrize("seconds", [0.2, 1.2, 3.0])
def test_a_pass_is_weighed_against_all_its_levels(seconds):
    """Two levels of an uncalibrated draft bring about one token: a pass of 1.2 tokens' time pays by the later ones."""
    planner = planner_of(linear(1.0, 0.0), linear(seconds, 0.0), 1)
    planner.ladder = Fixed(30)
    draft = Recorded(SteadyDraft([[0.9, 0.05]]))
    plan = planner.plan(np.zeros(1), draft if seconds < 3 else NoDraft(), load_of(1))
    assert (len(plan.tree) > 1) == (seconds < 3)
