"""What stays on the device: choices, features, states and draft levels. Texts are plain decoding's, copies are few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import assert_same, mixed, penalised, structured
from driving import add, prompt_ids, run

from echo_trt.backends.cuda.levels import level_call
from echo_trt.backends.cuda.transfers import TRANSFERS
from echo_trt.engine.assemble import level_shapes
from echo_trt.engine.drafters.levels import LevelsDrafter, drafted_trees
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.pack import ROOT, LevelShape, pack_levels
from echo_trt.speculation.super_tree import SuperTree

REQUESTS = {"mixed": mixed, "penalised": penalised, "structured": structured}


@pytest.fixture(scope="module")
def plain(bundle_of):
    """Return a function of requests: what plain decoding answers on the host, one request at a time."""
    llm = LLM(bundle_of("eagle3"), "autoregressive", 1)
    known = {}

    def get(requests: str):
        if requests not in known:
            known[requests] = llm.generate(*REQUESTS[requests]())
        return known[requests]

    return get


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize(("policy", "batch"), [("static", 1), ("echo", 4), ("goodput", 8), ("dense", 8), ("fixed", 4)])
def test_every_policy_writes_plain_decodings_text(policy, batch, requests, open_llm, plain):
    llm = open_llm("eagle3", policy, batch, "resident")
    prompts, params = REQUESTS[requests]()
    assert_same(llm.generate(prompts, params), plain(requests))


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


def test_children_of_what_was_not_drafted_are_none():
    drafted = np.zeros((2, 4, 3), np.int32)
    drafted[:, 0] = [[0, 1, 4], [0, 2, 1]]  # numbers
    drafted[:, 1] = [[ROOT, ROOT, 0], [ROOT, ROOT, ROOT]]  # parents
    drafted[:, 2] = [[7, 8, 9], [5, 6, 4]]  # tokens
    drafted[:, 3] = np.array([[-0.5, -1.0, -0.75], [-0.1, -0.3, -0.2]], np.float32).view(np.int32)
    trees = drafted_trees(drafted, np.array([1, 2]), 3)
    log_q, tokens = trees.expand_roots(np.array([1, 2]))
    assert tokens.tolist() == [[7, 8, 0], [5, 4, 6]]
    np.testing.assert_allclose(log_q, [[-0.5, -1.0, -np.inf], [-0.1, -0.2, -0.3]])
    tree = SuperTree.from_roots(np.array([3, 3, 3]))
    nodes = tree.add(np.array([1, 1, 2]), np.array([7, 99, 5]), np.zeros(3))
    log_q, tokens = trees.expand(tree, nodes)
    np.testing.assert_allclose(log_q[:, 0], [-0.25, -np.inf, -np.inf])
    assert tokens[0, 0] == 9
    below = tree.add(nodes[1:2], np.array([7]), np.zeros(1))
    assert trees.expand(tree, below)[0].max() == -np.inf


def test_calls_of_levels_say_where_rows_are():
    table = np.array([[4, 5, 0], [9, 2, 7]], np.int32)
    below = pack_levels(np.array([31, 3]), table, LevelShape(2, 3, 4))
    assert below.block_indices.tolist() == [4, 5, 9]
    call = {name: torch.from_numpy(getattr(below, name)) for name in ("past_lens", "block_begins", "block_indices")}
    call["live"] = torch.tensor([2], dtype=torch.int32)
    first, second = (level_call(level, 3, call) for level in (1, 2))
    assert first["positions"].tolist() == [31, 31, 31, 3, 3, 3]
    assert first["logit_rows"].tolist() == [0, 1, 2, 3, 4, 5]
    assert second["positions"].tolist() == [31, 31, 31, 32, 32, 32, 3, 3, 3, 4, 4, 4]
    assert second["logit_rows"].tolist() == [3, 4, 5, 9, 10, 11]
    assert second["tree_mask_begins"].tolist() == [0, 36, 72]
    call["live"] = torch.tensor([1], dtype=torch.int32)
    assert level_call(2, 3, call)["seq_begins"].tolist() == [0, 6, 6]


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
