"""Does what goodput learns of acceptance while it runs pay? The log-loss of P(accept), with and without.

    python scripts/benchmarks/acceptance.py bundles/smollm2-135m --prompts kinds.jsonl --limit 48

Answers prompts, so that each iteration verifies eight nodes per request, and records them. Then the same nodes are
foreseen in their order, each before its outcome is learnt: with and without the calibration, and where nothing is
learnt, a shift in log-odds for each source, or the whole fit. Prints a table in markdown; nothing in it is timed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.files.prompts import read_prompts
from echo_trt.speculation.goodput import planner as goodput
from echo_trt.speculation.goodput.learner.sources import AcceptanceFit, SourceLearner
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED, Acceptance
from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.planner import Iteration

TOKENS_A_REQUEST = 8  # verified per iteration
LEARNT = {"nothing": "none", "a shift for each source": "shift", "slope, and bias by depth": "fit"}

#: What is recorded of an iteration's nodes: source, depth, log path probability, and whether it was accepted, all [n].
Nodes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def main(
    bundle: Path,
    prompts: Annotated[list[Path], Parameter(help="JSONL; give it again for more, which follow one another")],
    limit: Annotated[int, Parameter(help="prompts of each file")] = 48,
    batch: int = 4,
    max_tokens: int = 96,
) -> None:
    """One row for each way to learn."""
    llm = LLM(bundle, "goodput", batch, prefix_cache=False)
    llm.loop.planner.ladder.size = lambda count, *_: TOKENS_A_REQUEST * count  # trials of sizes are another matter
    iterations = _recorded(llm, [prompt.text for path in prompts for prompt in read_prompts(path)[:limit]], max_tokens)
    number = sum(len(nodes[0]) for nodes in iterations)
    accepted = sum(nodes[3].sum() for nodes in iterations) / number
    print(f"{number:,} nodes of {len(iterations):,} iterations, of which {accepted:.1%} were accepted\n")
    print("| learnt while it runs | calibrated | not calibrated |\n|---|---|---|")
    known = llm.loop.planner.acceptance
    for title, way in LEARNT.items():
        begun = Acceptance(known.table, known.children), Acceptance.uncalibrated(len(known.children))
        print(f"| {title} | " + " | ".join(f"{_loss(model, way, iterations):.3f}" for model in begun) + " |")


def _recorded(llm: LLM, texts: list[str], max_tokens: int) -> list[Nodes]:
    """Two of three answers are greedy."""
    iterations: list[Nodes] = []
    learn = goodput.GoodputPlanner.observe

    def observe(planner: Any, iteration: Iteration) -> None:
        tree, accepted = iteration.plan.tree, np.zeros(len(iteration.plan.tree))
        accepted[iteration.path] = 1
        nodes = np.flatnonzero((tree.parent >= 0) & (tree.source < len(CALIBRATED)))
        if len(nodes):
            iterations.append((tree.source[nodes], tree.depth[nodes], tree.score[nodes], accepted[nodes]))
        learn(planner, iteration)

    llm.loop.planner.observe = observe.__get__(llm.loop.planner)
    params = [SamplingParams(max_tokens, temperature=0.8 * (i % 3 == 2), seed=i) for i in range(len(texts))]
    llm.generate([llm.chat_ids(text) for text in texts], params)
    return iterations


def _loss(model: Acceptance, way: str, iterations: list[Nodes]) -> float:
    """Return the mean negative log-likelihood of a node's outcome, in nats."""
    learner = SourceLearner(model, GoodputTuning())
    if way == "shift":
        for source, fit in enumerate(learner.fits):
            learner.fits[source] = AcceptanceFit(fit.slope, float(fit.bias[0]), GoodputTuning().fit_window, fixed=True)
    total = number = 0.0
    for source, depth, score, accepted in iterations:
        p = model.probability(source, depth, score)
        total -= np.log(np.where(accepted > 0, p, 1 - p)).sum()
        number += len(p)
        if way != "none":
            learner.observe(source, depth, score, p, accepted)
    return total / number


if __name__ == "__main__":
    run_alone(main)
