"""What the prefix cache finds changes how prompts are computed, never what is said, on real engines and all drafts."""

from __future__ import annotations

import pytest
from driving import assert_all_free, goodput_planner, machine, prompt_ids
from pairs import PAIRS

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


@pytest.mark.parametrize("pair", ["lookup", "model", "close", "dspark", "mtp"])
def test_a_conversation_is_the_same_under_every_policy(pair, open_llm, without):
    """Greedy and seeded in turn."""
    ways = [(way, conversation(without(pair), **way)) for way in (GREEDY, SEEDED)]
    llm = open_llm(pair, "autoregressive")
    for number, policy in enumerate(BUILT_IN, (*PAIRS, "mtp").index(pair)):
        sampling, expected = ways[number % 2]
        if policy.startswith("goodput"):
            llm.loop.planner = goodput_planner(llm, machine(), policy)
        else:
            llm.set_policy(policy)
        llm.loop.batch.blocks.forget_cached()
        found = llm.counters.cached_tokens
        assert conversation(llm, **sampling) == expected
        assert llm.counters.cached_tokens - found == 2 * BLOCK + 3 * BLOCK
    counters = llm.counters
    assert counters.prompt_tokens + counters.cached_tokens == counters.asked_tokens == len(BUILT_IN) * (45 + 78 + 111)
    assert_all_free(llm.loop)


@pytest.mark.parametrize(("pair", "policy"), [("self", "echo"), ("close", "static"), ("close", "autoregressive")])
def test_eight_at_once_share_a_system_prompt(pair, policy, open_llm, without):
    prompts = [[*SYSTEM, *prompt_ids(5 + 3 * i, i)] for i in range(8)]
    params = [SamplingParams(max_tokens=20 + i, ignore_eos=True, **(SEEDED if i % 2 else GREEDY)) for i in range(8)]
    expected = [c.token_ids for c in without(pair).generate(prompts, params)]
    llm = open_llm(pair, policy, 8)
    for part in range(2):  # at once, and again when all is there
        computed, held = llm.counters.prompt_tokens, 0
        for delta in llm.stream(prompts, params):
            held = max(held, int(llm.loop.batch.blocks.held.sum()) - llm.loop.batch.blocks.used)
            if delta.completion:
                assert delta.completion.token_ids == expected[delta.index]
        new = sum(map(len, prompts)) - 7 * 2 * BLOCK if part == 0 else sum(len(p) % BLOCK for p in prompts)
        assert new <= llm.counters.prompt_tokens - computed <= new + (16 + 2 * BLOCK) * (part == 0)
        assert held >= 4 * 2  # blocks that several requests hold, so often as they save one
    assert_all_free(llm.loop)


@pytest.mark.parametrize(("pair", "policy"), [("model", "autoregressive"), ("close", "echo")])
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


def test_the_recipe_turns_it_off(with_limits):
    llm = LLM(with_limits("lookup", prefix_cache=False), "static")
    for _ in range(2):
        llm.generate([prompt_ids(90, 0)], SamplingParams(max_tokens=3))
    assert llm.counters.prompt_tokens == llm.counters.asked_tokens == 180
    assert llm.loop.batch.blocks.free == llm.loop.batch.blocks.count
