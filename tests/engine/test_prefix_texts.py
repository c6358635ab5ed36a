"""What the prefix cache finds changes how prompts are computed, never what is said, on real engines and all drafts."""

from __future__ import annotations

import numpy as np
import pytest
from driving import add, assert_all_free, echo_planner, goodput_planner, prompt_ids, run
from pairs import PAIRS
from test_goodput_loop import machine

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import BUILT_IN

GREEDY, SEEDED = {}, {"temperature": 0.8, "top_p": 0.95, "seed": 7}
SYSTEM = prompt_ids(2 * BLOCK + 5, 99)


@pytest.fixture(scope="module")
def without(bundle_of):
    """pair -> an LLM that computes every prompt, plainly."""
    opened = {}
    return lambda pair: opened.setdefault(pair, LLM(bundle_of(pair), "autoregressive", 8, prefix_cache=False))


def conversation(llm: LLM, **sampling) -> list[list[int]]:
    """Three turns, each behind all that was said."""
    text, answers = prompt_ids(45, 0), []
    for turn in range(3):
        params = SamplingParams(max_tokens=25, ignore_eos=True, **sampling)
        answers.append(llm.generate([text], params)[0].token_ids)
        text = [*text, *answers[-1], *prompt_ids(8, 1 + turn)]
    return answers


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_conversation_is_the_same_under_every_policy(pair, sampling, open_llm, without):
    expected = conversation(without(pair), **sampling)
    llm = open_llm(pair, "autoregressive")
    for policy in BUILT_IN:
        if policy.startswith("goodput"):
            llm.loop.planner = goodput_planner(llm, machine(), policy)
        else:
            llm.set_policy(policy)
        llm.loop.batch.forget_cached()
        found = llm.counters.cached_tokens
        assert conversation(llm, **sampling) == expected
        assert llm.counters.cached_tokens - found == 2 * BLOCK + 3 * BLOCK
    counters = llm.counters
    assert counters.prompt_tokens + counters.cached_tokens == counters.asked_tokens == len(BUILT_IN) * (45 + 78 + 111)
    assert_all_free(llm.loop)


@pytest.mark.parametrize("policy", ["autoregressive", "static", "echo"])
@pytest.mark.parametrize("pair", ["self", "close"])
def test_eight_at_once_share_a_system_prompt(pair, policy, open_llm, without):
    prompts = [[*SYSTEM, *prompt_ids(5 + 3 * i, i)] for i in range(8)]
    params = [SamplingParams(max_tokens=20 + i, ignore_eos=True, **(SEEDED if i % 2 else GREEDY)) for i in range(8)]
    expected = [c.token_ids for c in without(pair).generate(prompts, params)]
    llm = open_llm(pair, policy, 8)
    for part in range(2):  # at once, and again when all is there
        computed, held = llm.counters.prompt_tokens, 0
        for delta in llm.stream(prompts, params):
            held = max(held, int(llm.loop.batch.blocks_held.sum()) - llm.loop.batch.used_blocks)
            if delta.completion:
                assert delta.completion.token_ids == expected[delta.index]
        new = sum(map(len, prompts)) - 7 * 2 * BLOCK if part == 0 else sum(len(p) % BLOCK for p in prompts)
        assert new <= llm.counters.prompt_tokens - computed <= new + (16 + 2 * BLOCK) * (part == 0)
        assert held >= 4 * 2  # blocks that several requests hold, so often as they save one
    assert_all_free(llm.loop)


@pytest.mark.parametrize("policy", ["autoregressive", "echo"])
@pytest.mark.parametrize("pair", ["model", "close"])
def test_a_full_pool_evicts_before_it_sets_anyone_back(pair, policy, open_llm, with_limits, without):
    llm = LLM(with_limits(pair, kv_blocks=8), policy, 3)
    prompts = [prompt_ids(70, i % 4) + prompt_ids(3, i) for i in range(12)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    expected = [c.token_ids for c in without(pair).generate(prompts, params)]
    for prompt, ids in zip(prompts, expected, strict=True):  # one after the other: only what is cached is in the way
        assert llm.generate([prompt], params)[0].token_ids == ids
    assert llm.counters.preemptions == 0 < llm.counters.evicted_blocks
    assert [c.token_ids for c in llm.generate(prompts, params)] == expected
    assert llm.counters.preemptions > 0 < llm.counters.cached_tokens
    assert_all_free(llm.loop)


@pytest.mark.parametrize("pair", ["self", "close"])
def test_what_a_cancelled_request_had_computed_is_right(pair, open_llm, without):
    loop = open_llm(pair, batch=2).loop
    prompt, params = prompt_ids(100, 3), {"max_tokens": 40}
    expected = without(pair).generate([prompt], SamplingParams(40, ignore_eos=True))[0].token_ids
    for steps in (1, 3, 5, 7, 9, 12, 20):  # in its prompt, and in its answer
        gone = add(loop, prompt, **params)
        run(loop, steps)
        loop.scheduler.cancel(gone)
        assert gone.generated == expected[: len(gone.generated)]
    whole = add(loop, prompt, **params)
    run(loop)
    assert whole.generated == expected
    assert loop.counters.cached_tokens > 3 * BLOCK
    assert_all_free(loop)


@pytest.mark.parametrize("policy", ["static", "echo"])
@pytest.mark.parametrize("pair", ["model", "self", "eagle3", "close"])
def test_acceptance_is_the_same_behind_a_found_prefix(pair, policy, open_llm, without):
    """The prefix ends with a block, whose last entry in a head's cache is the next token: each text has its own."""
    common, params = SYSTEM[: 2 * BLOCK], SamplingParams(max_tokens=50, ignore_eos=True)
    prompt = [*common, *prompt_ids(20, 1)]
    alone = without(pair)
    alone.set_policy(policy)
    expected = alone.generate([prompt], params)[0]
    alone.set_policy("autoregressive")
    llm = open_llm(pair, policy)
    for other in (0, 2, 1, 1):
        last = llm.generate([[*common, *prompt_ids(20, other)]], params)[0]
    assert llm.counters.cached_tokens == (1 + 1 + 2) * BLOCK
    assert (last.token_ids, last.accepted_length) == (expected.token_ids, expected.accepted_length)


def test_a_chain_of_one_request_does_not_write_into_what_another_shares(open_llm):
    """Two answers grow behind one prefix, in turn and with all kinds of trees; a third finds the prefix unchanged."""
    llm = open_llm("close", "static")
    loop = llm.loop
    add(loop, [*SYSTEM, 5, 6], max_tokens=1)
    run(loop)
    batch = loop.batch
    blocks = loop.batch.cache.find(list(batch.cache._block))
    before = loop.target._pool[:, blocks].copy()
    for i in range(3):
        add(loop, [*SYSTEM, *prompt_ids(7, i)], max_tokens=60)
    loop.planner = echo_planner(max_depth=3, beams=3, width=3, per_request=12)
    run(loop)
    assert loop.counters.cached_tokens == 3 * 2 * BLOCK
    np.testing.assert_array_equal(loop.target._pool[:, blocks], before)


def test_the_recipe_turns_it_off(with_limits):
    llm = LLM(with_limits("lookup", prefix_cache=False), "static")
    for _ in range(2):
        llm.generate([prompt_ids(90, 0)], SamplingParams(max_tokens=3))
    assert llm.counters.prompt_tokens == llm.counters.asked_tokens == 180
    assert llm.loop.batch.free_blocks == llm.loop.batch.num_blocks
