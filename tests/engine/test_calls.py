"""Tool calls as a draft: what stands between the arguments is proposed, and changes no text."""

from __future__ import annotations

import numpy as np
import pytest
from driving import add, assert_all_free, goodput_planner, machine, prompt_ids, run
from speculation.machines import load_of

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.engine.sources.calls import CallSource, skeleton

#: Two tools with a common beginning; the first takes two arguments.
READ, LIST = [[50, 51, 60, 61], [70, 71, 72], [80, 81]], [[50, 51, 65], [80, 81]]
TOOLS = skeleton([READ, LIST])
LOAD = load_of(1, epoch=np.array([0]))


def proposed(answer: list[int]) -> list[tuple[int, float]]:
    """Return the tokens that are proposed behind ``answer``, with their P(accept)."""
    batch = InputBatch(1, 200, 64, 1)
    batch.calls[0] = TOOLS
    batch.prompt_length[0], batch.length[0] = 2, 2 + len(answer)
    batch.tokens[0, : batch.length[0]] = [50, 51, *answer]
    source = CallSource(batch)
    whole, forces = source.propose(LOAD), source.forces(LOAD)
    source, batch.length[0] = CallSource(batch), 2
    for _ in answer:  # step by step
        source.propose(LOAD)
        batch.length[0] += 1
    again = source.propose(LOAD)
    assert again.tokens.tolist() == whole.tokens.tolist()
    tokens, chances = whole.tokens[:1].ravel(), np.exp(whole.log_p[:1].ravel())
    found = list(zip(tokens[tokens >= 0].tolist(), chances[tokens >= 0].tolist(), strict=True))
    assert forces == (bool(found) and found[0][1] > 0.3)
    return found


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ([9, 9], []),
        ([9, 50], [51, 60, 61]),
        ([50, 51, 65], []),  # a value begins, and nothing is known of it
        ([50, 51, 65, 9], [80, 81]),  # it may have ended
        ([50, 51, 65, 9, 80], [81]),
        ([50, 51, 60, 61, 9, 9, 70], [71, 72]),
        ([50, 51, 60, 61, 9, 70, 9], [70, 71, 72]),  # it was no end
        ([50, 51, 60, 61, 9, 80], [81]),  # an argument is left out
        ([50, 51, 60, 61, 9, 70, 71, 72, 9, 80, 81], []),
        ([50, 51, 65, 9, 80, 81, 50], [51, 60, 61]),  # a second call
        ([50, 9], []),
        ([50, 50], [51, 60, 61]),
    ],
)
def test_what_follows_in_a_call_is_proposed(answer, tokens):
    assert [token for token, _ in proposed(answer)] == tokens


def test_chances_grow_with_what_agrees_and_are_shared_by_tools_that_begin_alike():
    assert [p for _, p in proposed([50])] == pytest.approx([2 / 3, 3 / 4 / 2, 4 / 5])
    assert [p for _, p in proposed([50, 51, 60, 61, 9])] == pytest.approx([0.3 * 5 / 6, 6 / 7, 7 / 8])


@pytest.mark.parametrize("policy", ["goodput", "goodput-exact"])
def test_no_call_changes_a_text_and_known_parts_take_few_passes(policy, open_llm):
    llm, prompts = open_llm("lookup", "autoregressive", 3), [prompt_ids(9, seed) for seed in range(6)]
    params = SamplingParams(60, ignore_eos=True, temperature=0.9, seed=5)
    wanted = [answer.token_ids for answer in llm.generate(prompts, params)]
    verifications = {}
    for name in ("known", "other", "none"):
        llm.loop.planner = goodput_planner(llm, machine(0.01, 0.5), policy)
        tools = {"known": [[ids[1:20], ids[22:40], ids[43:]] for ids in wanted], "other": [READ, LIST], "none": []}
        requests = [Request(i, np.asarray(ids), params, calls=skeleton(tools[name])) for i, ids in enumerate(prompts)]
        for request in requests:
            llm.loop.scheduler.add(request)
        run(llm.loop)
        assert [request.generated for request in requests] == wanted
        assert_all_free(llm.loop)
        verifications[name] = sum(request.verifications for request in requests)
    assert verifications["known"] < 0.5 * verifications["none"]
    assert verifications["other"] < 1.1 * verifications["none"]


def test_a_preempted_request_goes_on_in_its_call(open_llm):
    llm, prompt = open_llm("lookup", "autoregressive", 1), prompt_ids(12, 0)
    wanted = llm.generate([prompt], SamplingParams(40, ignore_eos=True))[0].token_ids
    llm.loop.planner = goodput_planner(llm, machine(0.01, 0.5))
    request = add(llm.loop, prompt)
    request.calls = skeleton([[wanted[:20], wanted[22:]]])
    run(llm.loop, 3)
    llm.loop.scheduler.preempt_least_urgent()
    run(llm.loop)
    assert request.generated == wanted
    assert request.verifications < 20
