"""Requests under grammars in the loop: what is drafted for them, and what ends them."""

from __future__ import annotations

import numpy as np
import pytest
from batches import structured
from driving import Counted, Foresight, add, assert_all_free, goodput_planner, prompt_ids, run
from refusal import refused

from echo_trt.engine.drafters.grammars import prune
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.grammar.state import GrammarFailed, State
from echo_trt.speculation.goodput.model.costs import Costs, Curve


@pytest.fixture(scope="module")
def llm(open_llm) -> LLM:
    return open_llm("close", batch=3)


@pytest.fixture(scope="module")
def thinker(tool_bundle) -> LLM:
    """Return a model whose prompts open a thought."""
    return LLM(tool_bundle("thinking"), "echo", 3)


def begin(llm: LLM, **params) -> State:
    state = llm.request(0, prompt_ids(5, 0), SamplingParams(**params)).grammar
    assert state
    return state


def ids(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(text, add_special_tokens=False)


def test_forbidden_proposals_give_their_probability_to_the_allowed_ones(llm):
    state = begin(llm, structured={"regex": "[ab]"})
    (a,), (b,), (c,), (d,) = (ids(llm, letter) for letter in "abcd")
    log_q = np.log([[0.5, 0.2, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1]])
    tokens = np.array([[c, a, d, b]] * 2)
    log_q, tokens = prune([state, None], log_q, tokens)
    assert tokens[0, :2].tolist() == [a, b]
    assert np.exp(log_q[0]) == pytest.approx([0.5, 0.25, 0, 0])
    assert tokens[1].tolist() == [c, a, d, b]
    assert np.exp(log_q[1]) == pytest.approx([0.5, 0.2, 0.1, 0.1])


def test_forced_tokens_are_accepted_without_a_draft(open_llm):
    """The head of this pair proposes nothing right, so what is accepted came from the grammar."""
    llm = open_llm("eagle3", batch=1)
    llm.loop.planner = goodput_planner(llm, Costs(Curve([1, 256], [1e-3, 1e-3]), Curve([1, 256], [1e-3, 1e-3])))
    way = {"structured": {"json": {"const": "a rather long text that nobody would write by chance"}}}
    [completion] = llm.generate([prompt_ids(9, 1)], SamplingParams(80, **way))
    assert completion.text == '"a rather long text that nobody would write by chance"'
    assert completion.finish_reason == "stop"
    assert llm.loop.planner.totals()["accepted"]["grammar"] > 0.5 * len(completion.token_ids)
    assert completion.accepted_length > 2


@pytest.mark.parametrize("policy", ["autoregressive", "echo"])
def test_a_grammar_that_gives_up_fails_its_request_alone(policy, open_llm, monkeypatch):
    llm = open_llm("close", policy, 3)
    free = [add(llm.loop, prompt_ids(7, seed)) for seed in (1, 2)]
    run(llm.loop)
    wanted = [request.generated for request in free]
    after = State.after

    def given_up(state: State, token: int) -> State | None:
        if len(state.unseen) > 4:
            raise GrammarFailed("too complex")
        return after(state, token)

    monkeypatch.setattr(State, "after", given_up)
    doomed = llm.request(9, prompt_ids(6, 3), SamplingParams(40, structured={"json_object": True}))
    llm.loop.scheduler.add(doomed)
    free = [add(llm.loop, prompt_ids(7, seed)) for seed in (1, 2)]
    run(llm.loop)
    assert doomed.finish_reason == "invalid"
    assert doomed.failure == "structured cannot go on here (too complex); simplify it."
    assert [request.generated for request in free] == wanted
    assert_all_free(llm.loop)


class DraftsEnds(Foresight):
    """A drafter that takes every text for complete."""

    def _text_of(self, slot: int) -> np.ndarray:
        return np.zeros(9, np.int64)


def test_a_draft_behind_the_token_that_a_grammar_gave_up_on_is_not_looked_at(open_llm, monkeypatch):
    """Giving up ends the text, and the draft has an end there."""
    llm = open_llm("close", "echo", 3)
    llm.loop.drafter = DraftsEnds(llm.loop.batch, [])
    after, allowed = State.after, State.allowed

    def given_up(state: State, token: int) -> State | None:
        if len(state.unseen) <= 4:
            return after(state, token)
        if token == 0:
            return None
        raise GrammarFailed("too complex")

    def unknown(state: State, tokens: np.ndarray) -> np.ndarray:
        if len(state.unseen) > 4:
            raise GrammarFailed("too complex")
        return allowed(state, tokens)

    monkeypatch.setattr(State, "after", given_up)
    monkeypatch.setattr(State, "allowed", unknown)
    doomed = llm.request(9, prompt_ids(6, 3), SamplingParams(40, structured={"json_object": True}))
    llm.loop.scheduler.add(doomed)
    other = add(llm.loop, prompt_ids(7, 1))
    run(llm.loop)
    assert (doomed.finish_reason, doomed.failure) == (
        "invalid",
        "structured cannot go on here (too complex); simplify it.",
    )
    assert (other.finish_reason, len(other.generated)) == ("length", 40)


class Mute(Counted):
    """A target that finds every token impossible."""

    def run(self, call, **inputs):
        outputs = super().run(call, **inputs)
        return outputs | {"logits": np.full_like(outputs["logits"], -np.inf)}


def test_a_request_without_stop_tokens_ends_where_its_thought_cannot_close(thinker, monkeypatch):
    monkeypatch.setattr(thinker.loop, "target", Mute(thinker.loop.target))
    prompt, params = thinker.chat_ids("hello"), SamplingParams(20, thinking_token_budget=3, ignore_eos=True)
    request = thinker.request(0, prompt, params)
    thinker.loop.scheduler.add(request)
    run(thinker.loop, 50)
    assert request.finish_reason == "invalid"
    assert "allows no token" in request.failure
    assert min(request.generated) >= 0
    assert_all_free(thinker.loop)


def test_a_thought_whose_end_may_not_come_yet_is_refused(thinker):
    """The budget asks for the token that ends the text, ``min_tokens`` forbids it."""
    closes = thinker.tokenizer.backend_tokenizer.token_to_id("</think>")
    requested = {"thinking_token_budget": 5, "stop_token_ids": (closes,), "ignore_eos": True}
    prompt = thinker.chat_ids("hello")
    with refused("min_tokens is 6", "thinking_token_budget", "</think>", "stop_token_ids", "up to 5"):
        thinker.generate([prompt], SamplingParams(20, min_tokens=6, **requested))
    [answer] = thinker.generate([prompt], SamplingParams(20, min_tokens=5, **requested))
    assert (answer.finish_reason, len(answer.token_ids), answer.token_ids[-1]) == ("stop", 6, closes)


def test_preempted_requests_go_on_under_their_grammars(with_limits, open_llm):
    prompts, params = structured()
    wanted = [c.token_ids for c in open_llm("close", "autoregressive", 1).generate(prompts, params)]
    llm = LLM(with_limits("close", kv_blocks=9), "echo", 4)
    assert [c.token_ids for c in llm.generate(prompts, params)] == wanted
    assert llm.counters.preemptions > 0


def test_log_probabilities_of_prompts_are_those_of_their_texts(llm):
    prompts = [prompt_ids(n, n) for n in (40, 7, 1)]
    answers = llm.generate(prompts, SamplingParams(3, prompt_logprobs=2))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert [entry.token for entry in answer.prompt_logprobs] == prompt[1:]
        for position in {1, len(prompt) // 2, len(prompt) - 1} - {0, len(prompt)}:
            [truth] = llm.generate([prompt[:position]], SamplingParams(1, logprobs=2, ignore_eos=True))
            top = dict(truth.logprobs[0].top)
            assert dict(answer.prompt_logprobs[position - 1].top) == pytest.approx(top, abs=1e-4)
    again = llm.generate(prompts, SamplingParams(3, prompt_logprobs=2))
    assert [len(answer.prompt_logprobs) for answer in again] == [39, 6, 0]


@pytest.mark.parametrize("steps", [2, 4])
def test_log_probabilities_of_a_prompt_that_is_computed_twice_are_told_once(steps, llm):
    """The request is set back within its prompt, whose parts have 16 tokens, or behind it."""
    prompt, params = prompt_ids(40, 40), {"max_tokens": 9, "prompt_logprobs": 2}
    [answer] = llm.generate([prompt], SamplingParams(**params, ignore_eos=True))
    request = add(llm.loop, prompt, **params)
    run(llm.loop, steps)
    for preempted in llm.loop.scheduler.preempt_all():
        llm.loop.scheduler.add(preempted)
    run(llm.loop)
    assert [entry.token for entry in request.prompt_logprobs] == prompt[1:]
    reported = [entry.logprob for entry in request.prompt_logprobs]
    assert reported == pytest.approx([entry.logprob for entry in answer.prompt_logprobs], abs=1e-4)
