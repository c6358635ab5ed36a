"""What stays on the device: choices, features, states and draft levels. Texts are plain decoding's, copies are few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from batches import REQUESTS, assert_same
from driving import add, prompt_ids, run

from echo_trt.backends.cuda.transfers import TRANSFERS
from echo_trt.engine.assemble import level_shapes
from echo_trt.engine.drafters.levels import LevelsDrafter
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.super_tree import SuperTree


@pytest.mark.parametrize("requests", ["mixed", "penalised", "structured"])
@pytest.mark.parametrize(("policy", "batch"), [("static", 1), ("echo", 4), ("goodput", 8), ("dense", 8), ("fixed", 4)])
def test_every_policy_writes_plain_decodings_text(policy, batch, requests, open_llm, plain):
    llm = open_llm("eagle3", policy, batch, "resident")
    prompts, params = REQUESTS[requests]()
    assert_same(llm.generate(prompts, params), plain("eagle3", requests))


@pytest.mark.parametrize("policy", ["static", "echo"])
def test_levels_have_a_graph_under_policies_of_the_paper(policy, open_llm, monkeypatch):
    """The shapes are captured at the start; a fixed tree without a graph would lose every comparison."""
    llm = open_llm("eagle3", policy, 2, "resident")
    engine, requested = llm.loop.drafter.engine, set()
    run_levels = engine.run_levels

    def noted(call, below, shape, *arguments, **inputs):
        requested.add(shape)
        return run_levels(call, below, shape, *arguments, **inputs)

    monkeypatch.setattr(engine, "run_levels", noted)
    llm.generate([[*range(20)]] * 2, SamplingParams(24, ignore_eos=True))
    assert requested
    assert requested <= {*level_shapes(llm.manifest)}


def test_levels_on_the_device_are_those_that_the_host_would_expand(open_llm):
    """The same beams, scores and trees as a draft that asks for each level."""
    levels, beams, width, maximum = 3, 3, 4, 30
    llm = open_llm("close", "autoregressive", 4, "resident")
    assert isinstance(llm.loop.drafter, LevelsDrafter)
    for i in range(4):
        add(llm.loop, prompt_ids(5 + 9 * i, i))
    run(llm.loop, 5)
    batch = llm.loop.batch
    slots = batch.decoding()
    requests = np.array([0, 1, 3])
    roots = batch.tokens[slots, batch.length[slots] - 1]

    host, tree = llm.loop.drafter.begin(slots), SuperTree.from_roots(roots)
    frontier, offered = requests, host.expand_roots(requests)
    for level in range(levels + 1):
        log_q, tokens = (part[:, :width] for part in offered)
        parents = np.repeat(frontier, width)
        nodes = tree.add(parents, tokens.reshape(-1), tree.score[parents] + log_q.reshape(-1))
        if level < levels:
            frontier = np.sort(tree.best_first(nodes, tree.score[nodes], np.full(len(roots), beams)))
            offered = host.expand(tree, frontier)

    device, seen = llm.loop.drafter.begin(slots), SuperTree.from_roots(roots)
    device.look_ahead(levels, beams, width, maximum)
    frontier, offered, waits = requests, device.expand_roots(requests), TRANSFERS.waits
    for _ in range(levels + 1):
        log_q, tokens = offered
        parents = np.repeat(frontier, log_q.shape[1])
        there = log_q.reshape(-1) > -np.inf
        scores = seen.score[parents] + log_q.reshape(-1)
        frontier = seen.add(parents[there], tokens.reshape(-1)[there], scores[there])
        offered = device.expand(seen, frontier)
    assert TRANSFERS.waits == waits  # the levels came with the roots

    def paths(tree: SuperTree) -> dict[tuple, float]:
        found = {}
        for node in range(len(roots), len(tree)):
            path, above = [], node
            while above >= 0:
                path.append(int(tree.token[above]))
                above = tree.parent[above]
            found[int(tree.request[node]), *path[::-1]] = float(tree.score[node])
        return found

    everything, reported = paths(tree), paths(seen)
    for request in requests.tolist():
        own = sorted((score for path, score in everything.items() if path[0] == request), reverse=True)[:maximum]
        got = sorted((score for path, score in reported.items() if path[0] == request), reverse=True)
        np.testing.assert_allclose(got, own[: len(got)], atol=1e-3)
        assert len(got) == maximum
    for path, score in reported.items():
        assert score == pytest.approx(everything[path], abs=1e-3)


@pytest.mark.parametrize("policy", ["static", "echo", "goodput"])
def test_an_iteration_waits_for_the_device_a_few_times_and_copies_little(policy, open_llm):
    """Greedy, 64 requests: once for the draft, once for the verification; without prompts."""
    llm = open_llm("close", policy, 64, "resident")
    for i in range(64):
        add(llm.loop, prompt_ids(3 + i % 7, i), max_tokens=60)
    while llm.loop.batch.prefilling().size or llm.loop.scheduler.waiting:
        llm.loop.step()
    before, iterations = replace(TRANSFERS), 12
    run(llm.loop, iterations)
    assert (TRANSFERS.waits - before.waits) / iterations <= 3
    assert (TRANSFERS.down - before.down + TRANSFERS.up - before.up) / iterations < 64 * 1024
