"""Snapshots of a running service: bounded, true to what the loop did, without text, and nothing while nobody looks."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from driving import add, prompt_ids, run
from hypothesis import example, given
from hypothesis import strategies as st
from steered import submit

from echo_trt.engine.core import StepTrace
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.service import SNAPSHOT_FORMAT
from echo_trt.engine.service.service import Service
from echo_trt.engine.service.snapshots import (
    ACCEPTED,
    ITERATIONS,
    MAX_NODES,
    MAX_REQUESTS,
    MIN_NODES,
    PRUNED,
    REJECTED,
    ROOT,
    SnapshotRecorder,
    kept_nodes,
    tree_of,
)
from echo_trt.server.live import LARGEST
from echo_trt.speculation.drafts import Pass
from echo_trt.speculation.planner import Explanation, Iteration, Plan, StepContext
from echo_trt.speculation.super_tree import SuperTree

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
        submit(service, prompt_ids(9, i), params, lambda event, end=end: end.set() if event.reason else None)
    assert all(end.wait(SECONDS) for end in ends)


def test_a_loop_at_which_nobody_looks_does_nothing_for_it(service):
    recorder = SnapshotRecorder(service)
    assert service.loop.step_callback is None
    recorder.switch(True)
    assert service.loop.step_callback is not None
    recorder.switch(False)
    answer(service)
    assert service.loop.step_callback is None
    assert not recorder.seen
    assert recorder.snapshot()["last"] is None


def test_a_snapshot_tells_what_the_loop_did_and_no_text(service):
    recorder = SnapshotRecorder(service)
    recorder.switch(True)
    try:
        before = recorder.snapshot()
        assert (before["format"], before["last"], before["recent"]["time"]) == (SNAPSHOT_FORMAT, None, [])
        answer(service)
        assert recorder.seen
        now, again = recorder.snapshot(), recorder.snapshot()
        text = json.dumps(now)
    finally:
        recorder.switch(False)
    assert not recorder.seen
    columns = now["recent"]
    assert {len(column) for column in columns.values()} == {min(ITERATIONS, len(columns["time"]))}
    assert again["recent"]["time"] == []
    assert again["last"] == now["last"]
    assert now["slots"] == 3
    assert now["totals"]["emitted_tokens"] - before["totals"]["emitted_tokens"] == 160
    last = now["last"]
    position = max(i for i, requests in enumerate(columns["requests"]) if requests)
    assert last["time"] == columns["time"][position]
    assert sum(last["milliseconds"].values()) == pytest.approx(columns["milliseconds"][position], abs=0.1)
    fates = [fate for request in last["requests"] for fate in request["fate"]]
    assert fates.count(ROOT) == len(last["requests"]) == columns["requests"][position]
    assert fates.count(ACCEPTED) == columns["accepted"][position]
    assert fates.count(ROOT) + fates.count(ACCEPTED) + fates.count(REJECTED) == columns["verified"][position]
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
    recorder = SnapshotRecorder(service)
    recorder.switch(True)
    answer(service, 2, 5)
    reported, begin = [], time.thread_time()
    while len(reported) < 2 or (reported[-1] == 0 and len(reported) < 1000):
        reported.append(recorder.snapshot()["seconds"]["snapshots"])
    assert reported[0] == 0 < reported[-1] < time.thread_time() - begin + 1e-4
    assert reported == sorted(reported)
    recorder.switch(False)


def test_who_begins_to_look_during_an_iteration_sees_the_next_one_whole(open_llm):
    """Another thread switches the watch: an iteration is seen with all its requests, or not at all."""
    loop, seen = open_llm("close", "echo", 3).loop, []
    plan = loop.planner.plan

    def switched(*args):
        loop.step_callback = None if loop.step_callback else seen.append
        return plan(*args)

    loop.planner.plan = switched
    for seed in range(3):
        add(loop, prompt_ids(9, seed), max_tokens=30)
    run(loop)
    assert len(seen) > 3
    assert all(len(each.requests) == each.iteration.plan.tree.num_requests for each in seen)


# -- bounds ----------------------------------------------------------------------------------------------------------


def random_seen(requests: int, size: int, seed: int) -> StepTrace:
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
    load = StepContext(roots, none, none, 0, np.zeros((requests, 16), np.int64), none)
    path = np.flatnonzero(part.parent < 0)
    iteration = Iteration(plan, load, path, Pass(len(part), 0, 1e-3), (), 0, 0.0, 2e-3, 1e-3)
    return StepTrace(iteration, [10**9 + i for i in range(requests)], 0.0, requests, 1.8e9)


@given(st.integers(1, 90), st.integers(0, 40), st.integers(0, 2**31))
@example(64, 200, 2)
def test_trees_are_bounded_and_have_their_parents(requests, size, seed):
    seen = random_seen(requests, size, seed)
    reported = tree_of(seen, 0)
    assert len(reported["requests"]) == min(requests, MAX_REQUESTS)
    assert reported["omitted"] == requests - len(reported["requests"])
    nodes = sum(len(each["parent"]) for each in reported["requests"])
    assert nodes <= max(MAX_NODES, MIN_NODES * MAX_REQUESTS)
    assert len(json.dumps(reported, separators=(",", ":"))) < LARGEST / 2
    for each in reported["requests"]:
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
    reported = np.bincount(request[kept[fate[kept] == REJECTED]], minlength=64)
    assert (reported == np.minimum(verified, MAX_NODES // 64)).all()
    assert len(kept) == np.minimum(np.bincount(request), MAX_NODES // 64).sum()
