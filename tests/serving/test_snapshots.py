"""Snapshots of a running service: bounded, true to what the loop did, without text, and nothing while nobody looks."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from driving import add, prompt_ids, run
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.decoding.drafts import Pass
from echo_trt.decoding.planner import Explanation, Iteration, Load, Plan
from echo_trt.decoding.super_tree import SuperTree
from echo_trt.gateway.live import LARGEST
from echo_trt.runtime.params import SamplingParams
from echo_trt.runtime.watch import Seen
from echo_trt.serving.protocol import SNAPSHOT_FORMAT
from echo_trt.serving.service import Service
from echo_trt.serving.snapshots import (
    ACCEPTED,
    ITERATIONS,
    LEAST_NODES,
    MOST_NODES,
    MOST_REQUESTS,
    PRUNED,
    REJECTED,
    ROOT,
    Onlooker,
    kept_nodes,
    tree_of,
)

SECONDS = 60


@pytest.fixture(scope="module", params=["echo", "static", "autoregressive"])
def service(request, open_llm):
    service = Service(open_llm("close", request.param, 3))
    yield service
    service.close(0)


def answer(service: Service, prompts: int = 4, tokens: int = 40) -> None:
    """Let the service answer some prompts."""
    ends = [threading.Event() for _ in range(prompts)]
    for i, end in enumerate(ends):
        params = SamplingParams(tokens, ignore_eos=True)
        service.submit(prompt_ids(9, i), params, lambda event, end=end: end.set() if event.end else None)
    assert all(end.wait(SECONDS) for end in ends)


def test_a_loop_at_which_nobody_looks_does_nothing_for_it(service):
    onlooker = Onlooker(service)
    assert service.loop.watch is None
    onlooker.switch(True)
    assert service.loop.watch is not None
    onlooker.switch(False)
    answer(service)
    assert service.loop.watch is None
    assert not onlooker.news
    assert json.loads(onlooker.snapshot())["last"] is None


def test_a_snapshot_tells_what_the_loop_did_and_no_text(service):
    onlooker = Onlooker(service)
    onlooker.switch(True)
    try:
        before = json.loads(onlooker.snapshot())
        assert (before["format"], before["last"], before["recent"]["time"]) == (SNAPSHOT_FORMAT, None, [])
        answer(service)
        assert onlooker.news
        text = onlooker.snapshot()
        now, again = json.loads(text), json.loads(onlooker.snapshot())
    finally:
        onlooker.switch(False)
    assert not onlooker.news
    columns = now["recent"]
    assert {len(column) for column in columns.values()} == {min(ITERATIONS, len(columns["time"]))}
    assert again["recent"]["time"] == []
    assert again["last"] == now["last"]
    assert now["slots"] == 3
    assert now["totals"]["emitted_tokens"] - before["totals"]["emitted_tokens"] == 160
    last = now["last"]
    place = max(i for i, requests in enumerate(columns["requests"]) if requests)
    assert last["time"] == columns["time"][place]
    assert sum(last["milliseconds"].values()) == pytest.approx(columns["milliseconds"][place], abs=0.1)
    fates = [fate for request in last["requests"] for fate in request["fate"]]
    assert fates.count(ROOT) == len(last["requests"]) == columns["requests"][place]
    assert fates.count(ACCEPTED) == columns["accepted"][place]
    assert fates.count(ROOT) + fates.count(ACCEPTED) + fates.count(REJECTED) == columns["verified"][place]
    for request in last["requests"]:
        assert request["parent"][0] == -1
        assert all(parent < node for node, parent in enumerate(request["parent"]))
        assert all(0 <= chance <= 1 for chance in request["chance"])
        for node, fate in enumerate(request["fate"]):
            if fate == ACCEPTED:
                assert request["fate"][request["parent"][node]] in (ROOT, ACCEPTED)
    assert "token_ids" not in text
    assert "prompt_ids" not in text


def test_the_time_of_snapshots_is_that_of_those_before(service):
    onlooker = Onlooker(service)
    onlooker.switch(True)
    answer(service, 2, 5)
    told, begin = [], time.thread_time()
    while len(told) < 2 or (told[-1] == 0 and len(told) < 1000):
        told.append(json.loads(onlooker.snapshot())["seconds"]["snapshots"])
    assert told[0] == 0 < told[-1] < time.thread_time() - begin + 1e-4
    assert told == sorted(told)
    onlooker.switch(False)


def test_who_begins_to_look_during_an_iteration_sees_the_next_one_whole(open_llm):
    """Another thread switches the watch: an iteration is seen with all its requests, or not at all."""
    loop, seen = open_llm("close", "echo", 3).loop, []
    plan = loop.planner.plan

    def switched(*args):
        loop.watch = None if loop.watch else seen.append
        return plan(*args)

    loop.planner.plan = switched
    for seed in range(3):
        add(loop, prompt_ids(9, seed), max_tokens=30)
    run(loop)
    assert len(seen) > 3
    assert all(len(each.requests) == each.iteration.plan.tree.num_requests for each in seen)


# -- bounds ----------------------------------------------------------------------------------------------------------


def random_seen(requests: int, size: int, seed: int) -> Seen:
    """Make an iteration with trees of about ``size`` candidates, half of which were verified."""
    rng = np.random.default_rng(seed)
    tree = SuperTree.from_roots(rng.integers(0, 300, requests))
    chances = np.ones(requests)
    for _ in range(size):
        parents = rng.integers(0, len(tree), requests)
        tree.add(parents, rng.integers(0, 300, requests), np.zeros(requests), int(rng.integers(0, 5)))
        chances = np.concatenate((chances, chances[parents] * rng.random(requests)))
    roots = np.arange(requests)
    verified = np.flatnonzero(tree.ancestors_and_self(np.concatenate((roots, rng.integers(0, len(tree), requests)))))
    part, nodes = tree.sorted_by_request(verified)
    plan = Plan(part, chances[nodes], Explanation(tree, chances, nodes))
    none = np.zeros(requests, np.int64)
    load = Load(roots, none, none, 0, np.zeros((requests, 16), np.int64), none)
    path = np.flatnonzero(part.parent < 0)
    iteration = Iteration(plan, load, path, Pass(len(part), 0, 1e-3), (), 0, 0.0, 2e-3, 1e-3)
    return Seen(iteration, [10**9 + i for i in range(requests)], 0.0, requests, 1.8e9)


@given(st.integers(1, 90), st.integers(0, 40), st.integers(0, 2**31))
def test_trees_are_bounded_and_have_their_parents(requests, size, seed):
    seen = random_seen(requests, size, seed)
    told = tree_of(seen, 0)
    assert len(told["requests"]) == min(requests, MOST_REQUESTS)
    assert told["omitted"] == requests - len(told["requests"])
    nodes = sum(len(each["parent"]) for each in told["requests"])
    assert nodes <= max(MOST_NODES, LEAST_NODES * MOST_REQUESTS)
    assert len(json.dumps(told, separators=(",", ":"))) < LARGEST / 2
    for each in told["requests"]:
        assert each["parent"][0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(each["parent"][1:], 1))


def test_what_was_verified_is_told_before_what_was_not():
    seen = random_seen(64, 200, 1)
    explanation = seen.iteration.plan.explanation
    fate = np.full(len(explanation.candidates), PRUNED)
    fate[explanation.nodes] = REJECTED
    kept = kept_nodes(explanation.candidates, fate, explanation.chances)
    request = explanation.candidates.request
    verified = np.bincount(request[explanation.nodes], minlength=64)
    told = np.bincount(request[kept[fate[kept] == REJECTED]], minlength=64)
    assert (told == np.minimum(verified, MOST_NODES // 64)).all()
    assert len(kept) == np.minimum(np.bincount(request), MOST_NODES // 64).sum()


def test_a_large_snapshot_is_far_below_the_limit(service):
    now = {"last": tree_of(random_seen(64, 200, 2), 0)}
    assert len(json.dumps(now, separators=(",", ":"))) < LARGEST / 2
