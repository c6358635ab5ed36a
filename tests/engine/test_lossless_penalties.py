"""Penalties and log-probabilities are exact under trees: every policy, draft, batch and engine, and after setbacks."""

from collections import Counter

import numpy as np
import pytest
import torch
from batches import assert_same, penalised
from driving import Foresight, prompt_ids
from refusal import refused
from transformers import AutoModelForCausalLM

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, SamplingParams


@pytest.fixture(scope="module")
def llm_of(open_llm):
    opened = {}

    def get(pair: str, policy: str, batch: int, engine: str = "openvino") -> LLM:
        if (pair, batch, engine) not in opened:
            opened[pair, batch, engine] = open_llm(pair, batch=batch, engine=engine)
        opened[pair, batch, engine].set_policy(policy)
        return opened[pair, batch, engine]

    return get


@pytest.fixture(scope="module")
def plain(llm_of):
    """pair -> the answers of plain decoding, one request at a time."""
    known = {}

    def get(pair: str) -> list[Completion]:
        if pair not in known:
            known[pair] = llm_of(pair, "autoregressive", 1).generate(*penalised())
        return known[pair]

    return get


# -- plain decoding is right ---------------------------------------------------------------------------------------


def next_logits(model, text: list[int]) -> np.ndarray:
    return model(torch.tensor([text])).logits[0, -1].detach().numpy()


def test_plain_decoding_takes_the_best_of_the_penalised_logits(networks, llm_of):
    """Token by token against the model itself and a count of what was said."""
    prompt = prompt_ids(30, 4)
    way = {"repetition_penalty": 1.3, "presence_penalty": 0.8, "frequency_penalty": 0.5}
    params = [SamplingParams(30, ignore_eos=True), SamplingParams(30, ignore_eos=True, logprobs=4, **way)]
    free, answer = llm_of("self", "autoregressive", 1).generate([prompt] * 2, params)
    assert free.token_ids != answer.token_ids
    assert free.logprobs is None
    model, text = AutoModelForCausalLM.from_pretrained(networks / "target"), list(prompt)
    for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
        logits = next_logits(model, text)
        logprobs = torch.log_softmax(torch.tensor(logits), 0).numpy()
        best = np.argsort(-logprobs)[:4].tolist()
        assert entry.token == token
        assert [t for t, _ in entry.top] == best
        assert [entry.logprob, *(p for _, p in entry.top)] == pytest.approx(logprobs[[token, *best]], abs=1e-4)
        for output in set(text):
            logits[output] *= 1 / 1.3 if logits[output] > 0 else 1.3
        for output, times in Counter(text[len(prompt) :]).items():
            logits[output] -= 0.8 + 0.5 * times
        assert token == logits.argmax()
        text.append(token)


def test_repetition_is_hugging_faces(networks, llm_of):
    prompt = prompt_ids(20, 9)
    ours = llm_of("self", "static", 1).generate([prompt], SamplingParams(24, ignore_eos=True, repetition_penalty=1.2))
    model, requested = AutoModelForCausalLM.from_pretrained(networks / "target"), torch.tensor([prompt])
    theirs = model.generate(
        requested,
        attention_mask=torch.ones_like(requested),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.2,
    )
    assert ours[0].token_ids == theirs[0, len(prompt) :].tolist()


# -- and every other way the same (test_lossless.py has the matrix) ---------------------------------------------------


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("policy", ["static", "echo"])
def test_deep_paths_are_accepted_and_counted(policy, engine, open_llm, plain):
    """With a drafter that knows the penalised text: tokens of the path itself are penalised further down."""
    llm = open_llm("lookup", policy, 3, engine)
    prompts, params = penalised()
    want = plain("lookup")
    llm.loop.drafter = Foresight(llm.loop.batch, [p + w.token_ids for p, w in zip(prompts, want, strict=True)])
    assert_same(llm.generate(prompts, params), want)
    assert llm.counters.accepted_length > 1.5


@pytest.mark.parametrize("policy", ["autoregressive", "echo"])
def test_setbacks_neither_forget_nor_repeat(policy, open_llm, plain):
    """All requests are taken out again and again, as after an engine's failure, and go on from their text."""
    llm = open_llm("close", policy, 4)
    step, steps = llm.loop.step, 0

    def restless():
        nonlocal steps
        steps += 1
        if steps % 20 == 0:  # reading the prompts again takes half of that
            llm.loop.scheduler.waiting.extend(llm.loop.scheduler.preempt_all())
        return step()

    llm.loop.step = restless
    assert_same(llm.generate(*penalised()), plain("close"))
    assert steps > 20


def test_a_stop_string_cuts_logprobs_with_the_tokens(open_llm):
    llm = open_llm("self", "echo")
    params = SamplingParams(60, ignore_eos=True, logprobs=2, frequency_penalty=0.4)
    prompts = [prompt_ids(8, seed) for seed in range(4)]
    for prompt, whole in zip(prompts, llm.generate(prompts, params), strict=True):
        stop = llm.tokenizer.decode(whole.token_ids)[12:14]
        own = SamplingParams(60, ignore_eos=True, logprobs=2, frequency_penalty=0.4, stop=(stop,))
        cut = llm.generate([prompt], own)[0]
        assert cut.finish_reason == "stop"
        assert [entry.token for entry in cut.logprobs] == cut.token_ids
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forces_and_bans(temperature, open_llm):
    llm = open_llm("self", "echo")
    way = {"ignore_eos": True, "temperature": temperature}
    free = llm.generate([prompt_ids(8, 1)], SamplingParams(30, **way))[0].token_ids
    forced, banned = llm.generate(
        [prompt_ids(8, 1)] * 2,
        [SamplingParams(30, logit_bias={9: 100}, **way), SamplingParams(30, logit_bias={free[0]: -100.0}, **way)],
    )
    assert forced.token_ids == [9] * 30
    assert free[0] not in banned.token_ids
    assert banned.token_ids != free


def test_no_stop_token_comes_before_min_tokens(open_llm):
    llm = open_llm("self", "echo")
    minimum = {"logit_bias": {31: 100.0}, "stop_token_ids": (31, 40), "min_tokens": 13}
    answer = llm.generate([prompt_ids(8, 1)], SamplingParams(40, **minimum))[0]
    assert (len(answer.token_ids), answer.token_ids.index(31), answer.finish_reason) == (14, 13, "stop")


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"presence_penalty": 2.1}, ("presence_penalty is 2.1", "from -2 to 2")),
        ({"presence_penalty": float("nan")}, ("presence_penalty is nan",)),
        ({"frequency_penalty": -2.5}, ("frequency_penalty is -2.5", "from -2 to 2")),
        ({"frequency_penalty": "much"}, ("frequency_penalty is 'much'",)),
        ({"repetition_penalty": 0}, ("repetition_penalty is 0", "above 0")),
        ({"repetition_penalty": -1.0}, ("repetition_penalty is -1.0",)),
        ({"repetition_penalty": float("inf")}, ("repetition_penalty is inf",)),
        ({"logit_bias": {5: 101}}, ("logit_bias is {5: 101}", "from -100 to 100")),
        ({"logit_bias": {5: float("nan")}}, ("logit_bias",)),
        ({"logit_bias": {-1: 1}}, ("logit_bias is {-1: 1}",)),
        ({"logit_bias": [5]}, ("logit_bias is [5]",)),
        ({"min_tokens": 257}, ("min_tokens is 257", "max_tokens, 256")),
        ({"min_tokens": -1}, ("min_tokens is -1",)),
        ({"logprobs": 21}, ("logprobs is 21", "from 0 to 20")),
        ({"logprobs": -1}, ("logprobs is -1",)),
        ({"logprobs": True}, ("logprobs is True",)),
    ],
    ids=str,
)
def test_parameters_are_checked(settings, words):
    with refused(*words):
        SamplingParams(**settings)


def test_too_many_biased_tokens_are_refused():
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(300), 1)).logit_bias) == 300
    with refused("logit_bias is {0: 1", "at most 300"):
        SamplingParams(logit_bias=dict.fromkeys(range(301), 1))


def test_a_bias_on_no_token_is_refused(open_llm):
    with refused("logit_bias holds token id 300", "from 0 to 299"):
        open_llm("lookup").generate([[5]], SamplingParams(logit_bias={300: 1.0}))
