"""Who proposed a token, as requests are told, and requests that decode plainly among others that speculate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from batches import mixed, structured
from driving import goodput_planner, machine, prompt_ids

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import TOKEN_SOURCES, Completion, SamplingParams

TOLD = SamplingParams(40, ignore_eos=True, token_sources=True)


def sources(completion: Completion) -> list[str]:
    assert completion.token_sources is not None
    assert [entry.token for entry in completion.token_sources] == completion.token_ids
    for entry in completion.token_sources:
        assert (entry.probability is None) == (entry.source == "target")
        assert entry.probability is None or 0 < entry.probability <= 1
    return [entry.source for entry in completion.token_sources]


@pytest.mark.parametrize(("pair", "policy", "proposer"), [("self", "echo", "head"), ("lookup", "static", "lookup")])
def test_each_verification_has_one_token_of_the_target_and_the_rest_names_its_draft(pair, policy, proposer, open_llm):
    llm = open_llm(pair, policy, 3)
    prompts = [prompt_ids(5, seed) * 6 for seed in range(3)]
    for completion in llm.generate(prompts, TOLD):
        reported = sources(completion)
        assert set(reported) == {"target", proposer}
        assert len(reported) / reported.count("target") == pytest.approx(completion.accepted_length, rel=0.1)


def test_goodput_tells_copies_heads_and_both_apart(open_llm):
    llm = open_llm("close", "autoregressive", 3)
    llm.loop.planner = goodput_planner(llm, machine())
    prompts = [prompt_ids(5, seed) * 6 for seed in range(3)]
    reported = {source for completion in llm.generate(prompts, TOLD) for source in sources(completion)}
    assert {"target", "lookup"} < reported
    assert reported & {"head", "both"}


def test_what_a_grammar_forces_names_the_grammar(open_llm):
    llm = open_llm("close", "autoregressive", 3)
    llm.loop.planner = goodput_planner(llm, machine())
    prompts, params = structured()
    reported = llm.generate(prompts, [replace(one, token_sources=True) for one in params])
    assert any("grammar" in sources(completion) for completion in reported)
    assert all(set(sources(completion)) <= set(TOKEN_SOURCES) for completion in reported)


def test_a_chance_that_rounds_to_0_is_still_a_number(open_llm):
    llm = open_llm("self", "echo", 1)
    plan = llm.loop.planner.plan

    def hopeless(*given):
        found = plan(*given)
        return replace(found, probability=np.where(found.tree.parent < 0, 1.0, 0.0))

    llm.loop.planner.plan = hopeless
    (completion,) = llm.generate([prompt_ids(5, 0)], TOLD)
    chances = [entry.probability for entry in completion.token_sources if entry.probability is not None]
    assert len(chances) > 10
    assert set(chances) == {0.0}


def test_a_text_is_the_same_and_no_one_is_told_who_did_not_ask(open_llm):
    llm = open_llm("close", "echo", 3)
    prompts, params = mixed()
    silent = llm.generate(prompts, params)
    reported = llm.generate(prompts, [replace(one, token_sources=i % 2 == 0) for i, one in enumerate(params)])
    assert [c.token_ids for c in reported] == [c.token_ids for c in silent]
    assert all(c.token_sources is None for c in [*silent, *reported[1::2]])
    for completion in reported[::2]:
        sources(completion)


@pytest.mark.parametrize("stop", ["e", "th"])
def test_a_stop_string_cuts_the_sources_off_with_the_tokens(stop, open_llm):
    llm = open_llm("self", "static", 3)
    for completion in llm.generate([prompt_ids(9, seed) for seed in range(4)], replace(TOLD, stop=(stop,))):
        sources(completion)


def test_preempted_requests_keep_what_they_were_told(with_limits):
    llm = LLM(with_limits("close", kv_blocks=8), "echo", 3)
    for completion in llm.generate([prompt_ids(20, seed) for seed in range(5)], replace(TOLD, max_tokens=70)):
        sources(completion)
    assert llm.counters.preemptions


# -- requests that decode plainly ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["static", "echo", "goodput"])
@pytest.mark.parametrize("pair", ["close", "lookup", "dspark"])
def test_a_request_may_decode_plainly_among_others(pair, policy, open_llm):
    llm = open_llm(pair, "autoregressive", 3)
    prompts = [prompt_ids(5, seed) * 6 for seed in range(6)]
    expected = [c.token_ids for c in llm.generate(prompts, TOLD)]
    if policy == "goodput":
        llm.loop.planner = goodput_planner(llm, machine())
    else:
        llm.set_policy(policy)
    plainly = [replace(TOLD, speculate=i % 2 == 0) for i in range(6)]
    answers = llm.generate(prompts, plainly)
    assert [c.token_ids for c in answers] == expected
    for i, completion in enumerate(answers):
        assert (set(sources(completion)) == {"target"}) == (i % 2 == 1)
        assert (completion.accepted_length == 1) == (i % 2 == 1)


def test_a_batch_in_which_nobody_speculates_drafts_nothing_and_teaches_nothing(open_llm):
    llm = open_llm("close", "autoregressive", 3)
    llm.loop.planner = planner = goodput_planner(llm, machine())
    seen = []
    observe = planner.observe
    planner.observe = lambda iteration: (seen.append(len(iteration.load.slots)), observe(iteration))
    llm.generate([prompt_ids(9, seed) for seed in range(3)], replace(TOLD, speculate=False))
    assert llm.counters.draft_passes == llm.counters.drafted_tokens == 0
    assert not any(seen)  # prompts' passes alone


def test_a_stream_brings_sources_and_where_the_text_of_their_tokens_begins(open_llm):
    llm = open_llm("close", "echo", 3)
    reported, begins, text = [], [], ""
    for delta in llm.stream([prompt_ids(9, 1)], TOLD):
        reported += delta.sources
        begins += delta.begins
        text += delta.text
        whole = delta.completion
    assert reported == whole.token_sources
    assert text == whole.text
    assert begins == sorted(begins)
    ends = [*begins[1:], len(text)]
    for entry, begin, end in zip(reported, begins, ends, strict=False):
        own = llm.tokenizer.decode([entry.token], skip_special_tokens=True)
        assert "\ufffd" in own or text[begin:end] == own


# -- those who look on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["echo", "static", "goodput", "autoregressive"])
def test_an_onlooker_sees_every_iteration_as_it_was(policy, open_llm):
    llm = open_llm("close", "autoregressive", 3)
    if policy == "goodput":
        llm.loop.planner = goodput_planner(llm, machine())
    else:
        llm.set_policy(policy)
    prompts, seen = [prompt_ids(5, seed) * 6 for seed in range(5)], []
    unseen = llm.generate(prompts, TOLD)
    llm.loop.step_callback = seen.append
    before = llm.counters.copy()
    answers = llm.generate(prompts, TOLD)
    assert [c.token_ids for c in answers] == [c.token_ids for c in unseen]
    assert len(seen) == llm.counters.iterations - before.iterations
    assert sum(each.emitted for each in seen) == sum(len(c.token_ids) for c in answers)
    for each in seen:
        plan, explanation = each.iteration.plan, each.iteration.plan.explanation
        candidates, nodes = explanation.candidates, explanation.nodes
        assert len(each.requests) == candidates.num_requests == len(each.iteration.load.slots)
        np.testing.assert_array_equal(candidates.token[nodes], plan.tree.token)
        np.testing.assert_array_equal(candidates.request[nodes], plan.tree.request)
        np.testing.assert_array_equal(explanation.chances[nodes], plan.probability)
        assert len(explanation.chances) == len(candidates)
        assert 0 <= each.drafting <= each.iteration.seconds
    assert (max(len(each.iteration.plan.tree) for each in seen) > 3) == (policy != "autoregressive")
