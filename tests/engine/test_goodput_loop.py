"""Goodput in the loop: whatever it drafts, and whenever policies change, the text is plain decoding's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from batches import repeated
from driving import add, assert_all_free, goodput_planner, machine, prompt_ids, run
from pairs import PAIRS
from refusal import refused

from echo_trt.bundle.costs import COSTS
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.goodput.ladder import Ladder

POLICIES = ("goodput", "goodput-exact")
DRAFTERS = ("lookup", "model", "close", "dspark")  # one pair of each kind
#: Every pair among others, and each kind of drafter alone; either policy at each batch.
MATRIX = [(pair, (3, 8)[i % 2], POLICIES[i // 2 % 2]) for i, pair in enumerate((*PAIRS, "gemma3"))]
MATRIX += [(pair, 1, POLICIES[i % 2]) for i, pair in enumerate(DRAFTERS)]


@pytest.mark.parametrize(("pair", "batch", "policy"), MATRIX)
def test_goodput_writes_the_same_tokens(pair, batch, policy, open_llm, plain_ids):
    llm = open_llm(pair, "autoregressive", batch)
    llm.loop.planner = goodput_planner(llm, machine(), policy)
    some = slice(None) if batch > 1 else slice(1, None, 2)  # one after another they take long
    completions = llm.generate(*(part[some] for part in repeated()))
    assert [c.token_ids for c in completions] == plain_ids(pair)[some]
    assert llm.counters.drafted_tokens > 0
    assert (llm.counters.draft_passes > 0) == (pair != "lookup")
    assert_all_free(llm.loop)


def test_a_block_drafter_of_another_family_writes_the_same_tokens(open_llm, plain_ids):
    """DFlash and DSpark are in PAIRS."""
    family = "peagle"
    llm = open_llm(family, "autoregressive", 8)
    for policy in ("autoregressive", "echo", "static", "goodput", "goodput-exact"):
        if policy.startswith("goodput"):
            llm.loop.planner = goodput_planner(llm, machine(), policy)
        else:
            llm.set_policy(policy)
        drafted = llm.counters.drafted_tokens
        assert [completion.token_ids for completion in llm.generate(*repeated())] == plain_ids(family)
        assert (llm.counters.drafted_tokens > drafted) == (policy != "autoregressive")
        assert_all_free(llm.loop)


@pytest.mark.parametrize("pair", DRAFTERS)
def test_latency_targets_change_no_token(pair, open_llm, plain_ids, monkeypatch):
    """Every fourth request wants more than the machine has, so that others sit out passes, and chunks are small."""
    monkeypatch.setattr("echo_trt.speculation.goodput.model.iteration.MIN_CHUNK", 3)
    llm = open_llm(pair, "autoregressive", 8)
    llm.loop.planner = planner = goodput_planner(llm, machine(each=0.1))
    admit, sat_out, waited, computed = planner.admit, [], [], []

    def noted(seats):
        waited.append(int(seats.pace.waited.max()))
        found = admit(seats)
        sat_out.append(len(seats.decoding) - len(found.decoding))
        computed.append((found.chunk, seats.chunk))
        return found

    planner.admit = noted
    prompts, params = repeated()
    latency = {"ttft_ms": 1e6, "tpot_ms": 1e-3}
    params = [replace(each, latency=None if i % 4 else latency) for i, each in enumerate(params)]
    assert [c.token_ids for c in llm.generate(prompts, params)] == plain_ids(pair)
    assert max(sat_out) > 0
    assert max(waited) == planner.settings.tuning.max_sat_out  # so long, and no longer
    assert any(chunk < maximum for chunk, maximum in computed)
    assert_all_free(llm.loop)


class Held(Ladder):
    def size(self, requests, forecast, priced=False) -> int:
        return requests + 40


def test_passes_without_prompts_keep_the_size_that_is_held(open_llm, plain_ids):
    llm = open_llm("close", "autoregressive", 3)
    planner = goodput_planner(llm, replace(machine(), change=1.0, sizes=tuple(range(2, 65, 2))))
    planner.ladder = Held()
    planner.observe = lambda _: None  # what passes take here would change what a change is worth
    llm.loop.planner = planner
    seen, calls = llm.loop.target.run, []
    llm.loop.target.run = lambda call: (calls.append(call), seen(call))[1]
    assert [c.token_ids for c in llm.generate(*repeated())] == plain_ids("close")
    prompts = [((np.diff(c.seq_begins) > 1) & (np.diff(c.tree_mask_begins) == 0)).any() for c in calls]
    filled = [call.padded_to for call in calls]
    assert any(call.padded_to > len(call.token_ids) for call in calls)
    assert all(fill in (0, len(call.past_lens) + 40) for call, fill in zip(calls, filled, strict=True))
    assert not any(fill and prompt for fill, prompt in zip(filled, prompts, strict=True))
    assert 0 < filled.count(0) < len(filled) / 2


@pytest.mark.parametrize(("pair", "minimum"), [("self", 2.0), ("close", 1.3), ("dspark", 1.3)])
def test_much_is_accepted_where_the_draft_is_good(pair, minimum, open_llm):
    llm = open_llm(pair, "autoregressive", 2)
    for policy in POLICIES:
        planner = goodput_planner(llm, machine(), policy)
        planner.observe = lambda _: None  # it is not to learn from what else runs here
        llm.loop.planner = planner
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        assert min(c.accepted_length for c in llm.generate([prompt_ids(5, 0)] * 2, params)) > minimum


@pytest.mark.parametrize("pair", [*DRAFTERS, "gemma3"])
def test_policies_and_costs_may_change_at_every_iteration(pair, open_llm, plain_ids):
    llm = open_llm(pair, "autoregressive", 3)
    planners = {policy: goodput_planner(llm, machine(), policy) for policy in POLICIES}
    prompts, params = repeated()
    policies = itertools.cycle(["goodput", "echo", "autoregressive", "goodput-exact", "static"])
    costs = itertools.cycle([machine(), machine(each=0.1, draft=0.1), machine(each=9.0), machine(draft=0.3)])
    ids: dict[int, list[int]] = {}
    for delta in llm.stream(prompts, params):
        policy, now = next(policies), next(costs)
        if policy in planners:
            planners[policy].learner.costs = now
            llm.loop.planner = planners[policy]
        else:
            llm.set_policy(policy)
        if delta.completion:
            ids[delta.index] = delta.completion.token_ids
    assert [ids[i] for i in range(len(prompts))] == plain_ids(pair)
    assert_all_free(llm.loop)


@pytest.mark.parametrize("pair", ["lookup", "close"])
def test_costs_are_not_measured_while_requests_run(pair, open_llm, bundle_of, plain_ids):
    """To measure them would write over what the requests have in the KV pool."""
    (bundle_of(pair) / COSTS).unlink(missing_ok=True)
    llm = open_llm(pair, "echo", 3)
    prompts, params = repeated()
    ids: dict[int, list[int]] = {}
    for number, delta in enumerate(llm.stream(prompts, params)):
        if number == 4:
            with refused("not known yet", "while no request is running"):
                llm.set_policy("goodput")
        if delta.completion:
            ids[delta.index] = delta.completion.token_ids
    assert [ids[i] for i in range(len(prompts))] == plain_ids(pair)


def test_what_is_learnt_comes_from_what_ran(open_llm):
    llm = open_llm("close", "autoregressive", 2)
    planner = goodput_planner(llm, machine(), clock=False)
    llm.loop.planner = planner
    target, draft = planner.costs.target.seconds, planner.costs.draft.seconds
    llm.generate([prompt_ids(5, 0)] * 2, SamplingParams(max_tokens=40, ignore_eos=True))
    assert (planner.costs.target.seconds != target).any()
    assert planner.costs.draft.seconds[0] > draft[0]
    assert sum(planner.totals()["accepted"].values()) > 10
    assert planner.learner.history.speedup >= 1
    assert planner.learner.history.host_seconds > 0


def test_answers_are_billed_for_what_plain_decoding_would_have_taken(open_llm):
    """On a machine whose passes take what its costs say, the bill is the difference of the two runs."""
    llm = open_llm("self", "autoregressive", 3)
    prompts, params = [prompt_ids(9, seed) for seed in range(3)], SamplingParams(60, ignore_eos=True)
    llm.loop.planner = planner = goodput_planner(llm, machine(0.02, 0.1))
    took = []
    charge = llm.loop.bill.charge

    def recorded(iteration, *given):
        took.append(planner.clocked(iteration).seconds)
        return charge(planner.clocked(iteration), *given)

    llm.loop.bill.charge = recorded
    requests = [add(llm.loop, prompt, max_tokens=60) for prompt in prompts]
    run(llm.loop)
    del llm.loop.bill.charge
    saved, plain = llm.loop.bill.saved.sum(), 59 * 1.04e-3
    assert saved == pytest.approx(plain - sum(took), rel=0.1)
    assert saved > 0
    assert all(request.saved[0] == pytest.approx(saved, rel=0.1) for request in requests)
    assert 0 < requests[0].saved[1] < 0.2 * plain
    assert llm.generate(prompts, params)
