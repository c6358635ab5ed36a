"""Requests through time: joining, leaving, limits, setbacks, and a KV pool that is right after every commit."""

import time

import numpy as np
import pytest
from driving import Counted, add, assert_all_free, echo_planner, prompt_ids, run
from pairs import LIMITS, PAIRS, VOCAB
from refusal import refused

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import MAX_STOP_TOKENS, SamplingParams
from echo_trt.speculation import policies
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.pack import BLOCK

CONTEXT, CHUNK = LIMITS["context"], LIMITS["prefill_chunk"]


# -- requests come and go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "policy"), [(pair, ("echo", "static", "autoregressive")[i % 3]) for i, pair in enumerate(PAIRS)]
)
def test_a_full_pool_sets_the_youngest_back_and_loses_nothing(pair, policy, open_llm, with_limits):
    prompts = [prompt_ids(length, length) for length in (40, 61, 20, 33)]
    params = [
        SamplingParams(60, 0.7 * (i % 2), seed=i, ignore_eos=True, frequency_penalty=0.3 * (i // 2), logprobs=i or None)
        for i in range(4)
    ]
    wanted = open_llm(pair, policy, 4).generate(prompts, params)

    llm = LLM(with_limits(pair, kv_blocks=8), policy, 4)
    pieces, completions = [""] * 4, {}
    for delta in llm.stream(prompts, params):
        pieces[delta.index] += delta.text
        if delta.completion:
            completions[delta.index] = delta.completion
    assert llm.counters.preemptions > 0
    assert [completions[i].token_ids for i in range(4)] == [c.token_ids for c in wanted]
    for i in range(1, 4):
        reported = [entry.logprob for entry in completions[i].logprobs]
        assert reported == pytest.approx([entry.logprob for entry in wanted[i].logprobs], abs=1e-4)
    assert pieces == [completions[i].text for i in range(4)]
    assert llm.counters.emitted_tokens == sum(len(c.token_ids) for c in wanted)
    assert_all_free(llm.loop)


def test_the_youngest_gives_way_and_is_the_first_to_return(with_limits):
    loop = LLM(with_limits("lookup", kv_blocks=8), "autoregressive", 3).loop
    old, young = add(loop, prompt_ids(90, 0), max_tokens=60), add(loop, prompt_ids(80, 1), max_tokens=60)
    run(loop, 13)
    assert {old.slot, young.slot} == {0, 1}
    while young.slot >= 0:
        loop.step()
    assert old.slot >= 0
    late = add(loop, prompt_ids(3, 2))
    run(loop, 1)
    assert list(loop.scheduler.waiting) == [young, late]
    output = young.generated.copy()
    run(loop)
    assert young.generated[: len(output)] == output
    assert len(output) < len(young.generated) == 60
    assert_all_free(loop)


def test_a_preempted_request_is_as_far_behind_its_target_as_before(with_limits):
    loop, now = LLM(with_limits("lookup", kv_blocks=8), "autoregressive", 3).loop, time.monotonic() + 100
    add(loop, prompt_ids(90, 0), max_tokens=60)
    young = add(loop, prompt_ids(80, 1), max_tokens=60, latency={"tpot_ms": 50})

    def owed() -> float:
        """Return the tokens that were due from the first one until ``now``."""
        (lag,) = loop.pacer.pace(np.array([young.slot]), now).lag
        return lag + loop.batch.length[young.slot] - len(young.prompt)

    run(loop, 13)
    before = owed()
    assert before > 100
    while young.slot >= 0:
        loop.step()
    assert loop.counters.preemptions == 1
    while young.slot < 0:
        loop.step()
    assert owed() == pytest.approx(before)


def test_an_urgent_request_does_not_wait_behind_a_preempted_one(with_limits):
    loop = LLM(with_limits("lookup", kv_blocks=8), "autoregressive", 3).loop
    add(loop, prompt_ids(90, 0), max_tokens=60)
    young = add(loop, prompt_ids(80, 1), max_tokens=60)
    run(loop, 13)
    while young.slot >= 0:
        loop.step()
    late, urgent = add(loop, prompt_ids(3, 2)), add(loop, prompt_ids(3, 3))
    urgent.priority = -1
    run(loop, 1)
    assert urgent.slot >= 0
    assert list(loop.scheduler.waiting) == [young, late]
    run(loop)
    assert len(young.generated) == 60


def test_the_least_urgent_gives_way_before_the_youngest(with_limits):
    loop = LLM(with_limits("lookup", kv_blocks=8), "autoregressive", 3).loop
    patient, urgent = (add(loop, prompt_ids(length, 0), max_tokens=60) for length in (80, 90))
    patient.priority = 1
    run(loop, 13)
    assert {patient.slot, urgent.slot} == {0, 1}
    while loop.scheduler.running == 2:
        loop.step()
    assert list(loop.scheduler.waiting) == [patient]
    run(loop)
    assert loop.counters.preemptions == 1
    assert [len(request.generated) for request in (patient, urgent)] == [60, 60]
    assert_all_free(loop)


def test_an_abandoned_stream_leaves_nothing_behind(open_llm):
    llm = open_llm("self", batch=2)
    stream = llm.stream([prompt_ids(9, seed) for seed in range(4)], SamplingParams(ignore_eos=True))
    next(stream)
    assert llm.loop.scheduler.busy
    stream.close()
    assert_all_free(llm.loop)


def test_a_refused_prompt_leaves_nothing_behind(open_llm):
    llm = open_llm("lookup")
    with refused(
        "prompts[1]: the prompt has",
        f"{CONTEXT} tokens",
        f"context length is {CONTEXT}",
        "shorten it",
        "--max-model-len",
    ):
        llm.generate([prompt_ids(5, 0), prompt_ids(CONTEXT, 1)])
    assert_all_free(llm.loop)


def test_prompts_are_read_in_chunks_beside_running_requests(open_llm):
    loop = open_llm("lookup", "static").loop
    early = add(loop, [7, 8, 9] * 4)
    run(loop, 4)
    loop.target = target = Counted(loop.target)
    late = add(loop, prompt_ids(2 * CHUNK + 5, 1))
    mixed = 0
    while late.slot < 0 or late.slot not in loop.batch.decoding():
        loop.step()
        call = target.calls[-1]
        sizes, masked = np.diff(call.seq_begins), np.diff(call.tree_mask_begins) > 0
        mixed += bool(len(sizes) == 2 and masked[0] and sizes[1] > 1 and not masked[1])
        assert sizes[-1] <= CHUNK
    assert mixed
    assert len(target.calls) == 3
    assert early.slot >= 0


def test_a_short_prompt_does_not_wait_for_a_long_one(open_llm):
    texts = []
    for alone in (True, False):
        loop = open_llm("lookup", "static").loop
        long = add(loop, prompt_ids(3 * CHUNK + 5, 1), max_tokens=8)
        if alone:
            run(loop)
        short = add(loop, prompt_ids(6, 2), max_tokens=8)
        if not alone:
            loop.step()
            assert loop.batch.length[short.slot] > 6, "its first token"
            assert 0 < loop.batch.committed[long.slot] < 3 * CHUNK
        run(loop)
        texts.append((long.generated, short.generated))
    assert texts[0] == texts[1]


def test_a_prompt_waits_for_blocks_that_another_computes(open_llm):
    """Requests with one long beginning compute it once, as when they come one after another."""
    loop = open_llm("lookup", "static", 4).loop
    beginning = prompt_ids(2 * BLOCK + 1, 1)
    for number in range(3):
        add(loop, [*beginning, *prompt_ids(5, number)], max_tokens=3)
    run(loop)
    assert loop.counters.prompt_tokens == len(beginning) + 5 + 2 * (1 + 5)


def test_requests_are_served_oldest_first():
    batch = InputBatch(4, CONTEXT, 12, 1)
    batch.active[:] = [True, True, True, False]
    batch.admitted[:] = [5, 2, 9, 1]
    batch.length[:], batch.committed[:] = 10, [9, 9, 4, 9]
    assert batch.decoding().tolist() == [1, 0]
    assert batch.prefilling().tolist() == [2]
    batch.committed[:] = 0
    assert batch.decoding().tolist() == []
    assert batch.prefilling().tolist() == [1, 0, 2]


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_short_and_long_prompts(pair, open_llm):
    """One token, a chunk and one token more, and one token less than the context."""
    llm = open_llm(pair, "autoregressive")
    prompts = [prompt_ids(n, n) for n in (1, CHUNK, CHUNK + 1, CONTEXT - 1, CONTEXT - 5)]
    plain = llm.generate(prompts, SamplingParams(ignore_eos=True, max_tokens=12))
    assert [len(c.token_ids) for c in plain] == [12, 12, 12, 1, 5]
    assert {c.finish_reason for c in plain} == {"length"}
    for policy in ("static", "echo"):
        llm.set_policy(policy)
        assert [c.token_ids for c in llm.generate(prompts, SamplingParams(ignore_eos=True, max_tokens=12))] == [
            c.token_ids for c in plain
        ]


@pytest.mark.parametrize("policy", ["autoregressive", "static", "echo"])
def test_stop_tokens_end_the_text_and_the_models_own_unless_they_are_ignored(policy, open_llm):
    llm = open_llm("self", "autoregressive")
    prompt = prompt_ids(6, 3)
    whole = llm.generate([prompt], SamplingParams(30, ignore_eos=True))[0].token_ids
    llm.set_policy(policy)
    for stop in (whole[3], whole[10], whole[-1]):
        cut = llm.generate([prompt], SamplingParams(30, ignore_eos=True, stop_token_ids=(stop, 299)))[0]
        assert cut.token_ids == whole[: whole.index(stop) + 1]
        assert cut.finish_reason == "stop"
    llm.loop.scheduler.eos = (299, whole[5])
    assert llm.generate([prompt], SamplingParams(30))[0].token_ids == whole[: whole.index(whole[5]) + 1]
    assert llm.generate([prompt], SamplingParams(30, ignore_eos=True))[0].token_ids == whole


def test_what_is_drafted_is_what_may_still_be_said(open_llm):
    """No draft token beyond max_tokens is verified: the last iterations of a request get smaller trees."""
    loop = open_llm("self", batch=1).loop
    loop.planner = echo_planner(max_depth=3, beams=1, width=1, per_request=4)
    for limit, chains in ((9, [6, 4, 4]), (8, [6, 4, 3]), (6, [6, 4, 1]), (2, [6, 1])):
        loop.target = target = Counted(loop.target)
        add(loop, prompt_ids(6, 0), max_tokens=limit)
        run(loop)
        assert [len(call.token_ids) for call in target.calls] == chains


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": True}, ("max_tokens", "True")),
        ({"max_tokens": "many", "min_tokens": 1}, ("max_tokens is 'many'",)),
        ({"min_tokens": 257}, ("min_tokens is 257", "max_tokens, 256")),
        ({"repetition_penalty": float("inf")}, ("repetition_penalty is inf",)),
        ({"stop_token_ids": 7}, ("stop_token_ids", "7")),
        ({"logit_bias": {5: float("nan")}}, ("logit_bias",)),
        ({"logit_bias": {-1: 1}}, ("logit_bias is {-1: 1}",)),
        ({"logprobs": True}, ("logprobs is True",)),
    ],
    ids=str,
)
def test_what_is_no_number_or_no_list_is_refused(settings, words):
    """Numbers beyond a parameter's bounds: tests/test_parameters.py."""
    with refused(*words):
        SamplingParams(**settings)


def test_too_many_biased_tokens_are_refused():
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(300), 1)).logit_bias) == 300
    with refused("logit_bias is {0: 1", "at most 300"):
        SamplingParams(logit_bias=dict.fromkeys(range(301), 1))


def test_a_bias_on_no_token_is_refused(open_llm):
    with refused("logit_bias holds token id 300", "from 0 to 299"):
        open_llm("lookup").generate([[5]], SamplingParams(logit_bias={300: 1.0}))


def test_too_many_stop_tokens(open_llm):
    loop = open_llm("lookup").loop
    own = len(loop.scheduler.eos)
    add(loop, [5], stop_token_ids=tuple(range(MAX_STOP_TOKENS - own)), ignore_eos=False)
    with refused("stop_token_ids", f"{MAX_STOP_TOKENS - own + 1} ids", f"at most {MAX_STOP_TOKENS - own}"):
        add(loop, [5], stop_token_ids=tuple(range(MAX_STOP_TOKENS - own + 1)), ignore_eos=False)


def test_prompts_are_checked(open_llm):
    llm = open_llm("lookup")
    with refused("empty", "at least one token"):
        llm.generate([[]])
    for token in (-1, VOCAB):
        with refused(f"token id {token}", f"from 0 to {VOCAB - 1}"):
            llm.generate([[5, token]])
    with refused("2 entries", "3 prompts"):
        llm.generate([[5], [6], [7]], [SamplingParams()] * 2)
    assert_all_free(llm.loop)


def test_a_pool_too_small_for_one_request(with_limits):
    folder = with_limits("lookup", kv_blocks=5)
    with refused("kv_blocks is 5", "raise kv_blocks or lower context"):
        LLM(folder)


@pytest.mark.parametrize("batch", [0, 4097])
def test_batch_is_checked(batch, bundle_of):
    with refused(f"batch is {batch}", "from 1 to 4,096"):
        LLM(bundle_of("lookup"), batch=batch)


def test_a_policy_that_comes_back_goes_on_with_what_it_has_learnt(open_llm):
    """Under its own name or as the recipe's; with another K_max it is another one."""
    llm = open_llm("lookup", None)
    first = llm.loop.planner
    for name in ("echo", None, "echo"):
        llm.set_policy("autoregressive")
        assert llm.loop.planner.name == "autoregressive"
        llm.set_policy(name)
        assert llm.loop.planner is first
    llm.set_policy("echo", 9)
    assert (llm.loop.planner.name, llm.loop.planner.budget) == ("echo", 9)
    assert first.budget == 24


def test_a_policy_of_ones_own_gets_the_measured_k_max(open_llm, monkeypatch):
    """As ``echo`` does, where the recipe has none."""
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))

    @policies.policy("mine", "echo's", policies.policy_named("echo").shape)
    def mine(name, settings, make_goodput):
        return EchoPlanner(name, policies.echo_settings(name, settings))

    llm = open_llm("lookup", "autoregressive")
    monkeypatch.setitem(vars(llm.manifest.recipe.decoding), "budget", None)
    llm.set_policy("mine")
    costs = llm.tuning.costs
    assert llm.loop.planner.budget == next_size(costs.sizes, costs.hinge.k_max)
