"""What stays on the device: choices, features, states and draft levels. Texts are plain decoding's, copies are few."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from batches import REQUESTS, assert_same
from driving import add, prompt_ids, run

from echo_trt.backends.cuda.transfers import TRANSFERS
from echo_trt.engine.drafters.levels import LevelsDrafter
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.super_tree import SuperTree


@pytest.mark.parametrize(
    ("policy", "batch", "requests"),
    [("static", 1, "mixed"), ("echo", 4, "penalised"), ("echo", 4, "structured"), ("goodput", 8, "penalised")],
)
def test_every_policy_writes_plain_decodings_text(policy, batch, requests, open_llm, plain):
    llm = open_llm("eagle3", policy, batch, "resident")
    prompts, params = REQUESTS[requests]()
    assert_same(llm.generate(prompts, params), plain("eagle3", requests))


def test_texts_stay_where_the_host_waits_at_every_gate(open_llm, plain, monkeypatch):
    """As it does under load; so few requests would draft beyond gates."""
    monkeypatch.setattr("echo_trt.speculation.echo.settings.WEIGHT_ROWS", 0)
    prompts, params = REQUESTS["mixed"]()
    assert_same(open_llm("eagle3", "echo", 8, "resident").generate(prompts, params), plain("eagle3", "mixed"))


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("policy", ["static", "echo", "goodput"])
def test_every_draft_that_a_policy_asks_for_has_a_graph(policy, batch, open_llm, monkeypatch):
    """The shapes are captured at the start; a fixed tree without a graph would lose every comparison."""
    llm = open_llm("close", policy, batch, "resident")
    levels, requested = llm.loop.drafter.engine._levels, set()
    draft = levels._run

    def noted(below, rows, shape):
        requested.add((len(rows), shape))
        return draft(below, rows, shape)

    monkeypatch.setattr(levels, "_run", noted)
    llm.generate([[*range(20)]] * batch, SamplingParams(24, ignore_eos=True))
    assert requested or policy == "goodput"  # which may find that no draft pays
    assert all(shape in llm.loop.planner.level_shapes(requests) for requests, shape in requested)


@pytest.mark.parametrize(("ends", "stopped"), [([4], -1), ([1, 4], 1), ([2, 3, 4], 0), ([1, 2, 3, 4], 3)])
def test_levels_on_the_device_are_those_that_the_host_would_expand(ends, stopped, open_llm):
    """The same beams, scores and trees as a draft that asks for each level; also if a part of the requests goes on."""
    levels, beams, width, maximum = 3, 3, 4, 15
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
    device.look_ahead(ends[0], beams, width, maximum)
    waits, lag = TRANSFERS.waits, llm.loop.drafter.draft_lag(slots[requests]).sum()
    frontier, offered = requests, device.expand_roots(requests)
    for depth in range(1, levels + 2):
        log_q, tokens = offered
        parents = np.repeat(frontier, log_q.shape[1])
        there = log_q.reshape(-1) > -np.inf
        scores = seen.score[parents] + log_q.reshape(-1)
        frontier = seen.add(parents[there], tokens.reshape(-1)[there], scores[there])
        if depth in ends[:-1]:
            frontier = frontier[seen.request[frontier] != stopped]
            device.look_ahead(ends[ends.index(depth) + 1], beams, width, maximum)
        offered = device.expand(seen, frontier)
    assert TRANSFERS.waits == waits + len(ends)  # levels come with the roots, or with those above
    going = [3 if depth <= ends[0] or stopped < 0 else 2 for depth in range(2, levels + 2)]  # requests of a level
    assert [done.tokens for done in device.passes] == [lag, *(beams * count for count in going)]

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
    begins = 1, *ends
    for request in requests.tolist():
        for begin, end in itertools.pairwise(begins[:2] if request == stopped else begins):
            own, got = (
                sorted((s for path, s in trees.items() if path[0] == request and begin < len(path) - 2 <= end))[::-1]
                for trees in (everything, reported)
            )
            assert len(got) == min(max(maximum, beams * (end - begin)), len(own))
            best = max(len(got) - beams * (end - begin), 0)  # beside the beams of all levels
            np.testing.assert_allclose(got[:best], own[:best], atol=1e-3)
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
