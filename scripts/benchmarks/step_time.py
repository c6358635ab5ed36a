"""Time one iteration in Python, without any engine: plan, mask, pack, accept.

python scripts/benchmarks/step_time.py --repeats 300
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from echo_trt.bundle.recipe import Decoding
from echo_trt.engine.options import run_alone
from echo_trt.engine.sources.ngrams import NGramSource
from echo_trt.speculation.accept import accept
from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.pack import BLOCK, pack
from echo_trt.speculation.planner import RECENT, StepContext
from echo_trt.speculation.policies import make_planner
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask
from echo_trt_lab.ngram_tables import context_keys

LOADS = ((1, 60), (32, 256), (256, 512))  # requests, K_max
GROWTH = (64, 128, 256, 512)  # requests, with K_max two tokens each
POLICIES = ("echo", "goodput")
PHASES = ("plan", "mask", "pack", "accept")
CONTEXT = 1024


class FreeDraft(Draft):
    """Children of a fixed shape from a table drawn beforehand: it costs nothing but the slicing.

    Half of its rows are sure of the next token, half are not, so that trees end at every depth.
    """

    def __init__(self, rows: int, k: int, rng: np.random.Generator):
        sure = rng.random(rows) < 0.5
        sure[0] = True
        q = np.where(sure[:, None], *(rng.dirichlet(np.full(4 * k, spread), rows) for spread in (0.03, 2.0)))
        q = np.sort(q)[:, : -k - 1 : -1]
        self.log_q = np.log(np.maximum(q, 1e-9)).astype(np.float32)
        self.tokens = np.tile(np.arange(k), (rows, 1))

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.log_q[: len(requests)], self.tokens[: len(requests)]

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.log_q[: len(nodes)], self.tokens[: len(nodes)]


def known_ngrams(tokens: int = 1000, longest: int = 6) -> NGrams:
    """Whatever a text ends with, something is known to follow."""
    keys, first = np.unique(context_keys(np.arange(tokens), 1)[1:, 0], return_index=True)
    return NGrams(keys, first, np.linspace(0.05, 0.5, len(keys)), longest)  # less than a draft says


def planner_for(name: str, requests: int, budget: int) -> GoodputPlanner | EchoPlanner:
    """Goodput's verification is free up to the budget and dear beyond, and its draft costs next to nothing."""
    costs = Costs(Curve([1, budget, 2 * budget], [0.02, 0.02, 1.0]), Curve([1, 4 * budget], [1e-6, 1e-6]))
    settings = Decoding(budget=budget, gates={1: 0.2, 3: 0.3}).model_dump()
    ngrams = known_ngrams()

    def goodput(name: str, numbers: GoodputSettings) -> GoodputPlanner:
        acceptance = Acceptance.uncalibrated(numbers.max_depth)
        return GoodputPlanner(name, numbers, costs, acceptance, requests, [NGramSource(ngrams, numbers, acceptance)])

    return make_planner(name, settings, goodput)


def measure(name: str, requests: int, budget: int, repeats: int) -> tuple[np.ndarray, int]:
    """Seconds of each phase [repeats, phases], and the tokens that an iteration verifies."""
    rng = np.random.default_rng(0)
    planner = planner_for(name, requests, budget)
    beams, width = planner.settings.beams, planner.settings.width
    draft = FreeDraft(requests * beams, width, rng)
    roots, max_draft_len = rng.integers(0, 1000, requests), np.full(requests, CONTEXT)
    past = rng.integers(1, CONTEXT // 2, requests)
    block_table = rng.permutation(requests * (CONTEXT // BLOCK)).reshape(requests, -1)
    target = np.where(rng.random(budget) < 0.6, 0, width)  # a node's next token: its best child's, or none
    recent = rng.integers(0, 1000, (requests, RECENT))
    slots = np.arange(requests)
    load = StepContext(slots, max_draft_len, np.ones(requests, np.int64), int(past.sum()), recent, epoch=slots)
    seconds = []
    for _ in range(repeats):
        marks = [time.perf_counter()]
        tree = planner.plan(roots, draft, load).tree
        marks.append(time.perf_counter())
        mask = ancestor_mask(tree)
        marks.append(time.perf_counter())
        pack(tree.token, past[tree.request] + tree.depth, past, tree.sizes, block_table, np.arange(len(tree)), mask)
        marks.append(time.perf_counter())
        accept(tree, lambda nodes: target[nodes])
        marks.append(time.perf_counter())
        seconds.append(np.diff(marks))
    return np.array(seconds), len(tree)


def main(repeats: Annotated[int, Parameter(help="iterations of each load")] = 300) -> None:
    """Python time of one iteration at several loads, and how it grows with the batch."""
    console = Console()
    for name in POLICIES:
        _show(console, name, repeats)


def _show(console: Console, name: str, repeats: int) -> None:
    table = Table("B", "N", *PHASES, "median", "fastest", title=f"{name}: milliseconds of one iteration")
    sizes, usual = [], []
    for requests, budget in sorted({*LOADS, *((count, 2 * count) for count in GROWTH)}):
        measure(name, requests, budget, max(repeats // 10, 1))  # warm up
        seconds, tokens = measure(name, requests, budget, repeats)
        total = seconds.sum(axis=1)
        figures = (*np.median(seconds, axis=0), np.median(total), total.min())
        table.add_row(str(requests), str(tokens), *(f"{1e3 * value:.3f}" for value in figures))
        if requests in GROWTH:
            sizes.append(tokens)
            usual.append(np.median(total))
    console.print(table)
    exponent = np.polyfit(np.log(sizes), np.log(usual), 1)[0]
    console.print(f"From {sizes[0]} to {sizes[-1]} tokens the time grows as tokens^{exponent:.2f}.")


if __name__ == "__main__":
    run_alone(main)
