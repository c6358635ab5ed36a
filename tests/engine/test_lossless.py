"""Speculation changes when tokens come, never which: every policy, draft, batch and engine writes the same text."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from batches import PROMPTS, REQUESTS, assert_same
from driving import Foresight, assert_all_free, prompt_ids
from pairs import CHANGES, FAMILY_PAIRS, FOLDERS, PAIRS
from transformers import AutoModelForCausalLM

from echo_trt.engine.params import SamplingParams

SPECULATIVE = ("static", "echo")
POLICIES = ("autoregressive", *SPECULATIVE)
BATCHES, ENGINES = (1, 3, 8), ("openvino", "torch")
KINDS = ("mixed", "penalised", "structured")
#: Every pair with every policy; batch, engine and requests change along the diagonals, so that any two choices meet.
MATRIX = [
    (pair, policy, BATCHES[(i + j) % 3], ENGINES[(i + j) % 2], KINDS[(i + 2 * j) % 3])
    for i, pair in enumerate((*PAIRS, *FAMILY_PAIRS))
    for j, policy in enumerate(POLICIES)
]


@pytest.mark.parametrize("target", ["target", "plain_target", *FAMILY_PAIRS])
def test_plain_decoding_is_the_models_own(target, networks, llm_of):
    pair = {FOLDERS[pair][0]: pair for pair in (*PAIRS, *FAMILY_PAIRS)}[target]
    prompts = [prompt_ids(n, i) for i, n in enumerate(PROMPTS)][:4]
    ours = llm_of(pair, "autoregressive", 3).generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    model = AutoModelForCausalLM.from_pretrained(networks / target)
    for prompt, completion in zip(prompts, ours, strict=True):
        requested = torch.tensor([prompt])
        theirs = model.generate(
            requested, attention_mask=torch.ones_like(requested), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert completion.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("pair", "policy", "batch", "engine", "requests"), MATRIX)
def test_policies_write_the_same(pair, policy, batch, engine, requests, llm_of, plain):
    prompts, params = REQUESTS[requests]()
    count = 4 if batch == 1 else len(prompts)
    llm = llm_of(pair, policy, batch, engine)
    drafted = llm.counters.drafted_tokens
    assert_same(llm.generate(prompts[:count], params[:count]), plain(pair, requests)[:count])
    assert (llm.counters.drafted_tokens > drafted) == (policy in SPECULATIVE)
    assert_all_free(llm.loop)


def test_any_two_choices_meet_in_the_matrix():
    columns = list(zip(*MATRIX, strict=True))
    for left, right in itertools.combinations(columns, 2):
        met = set(zip(left, right, strict=True))
        assert met == set(itertools.product(set(left), set(right)))


@pytest.mark.parametrize(("pair", "minimum"), [("self", 2.5), ("close", 1.5), ("dspark", 1.4)])
def test_much_is_accepted_where_the_draft_is_good(pair, minimum, llm_of):
    """So that the tests above are about accepting as well as about refusing."""
    for policy in SPECULATIVE:
        completions = llm_of(pair, policy, 1).generate(
            [prompt_ids(5, 0)], SamplingParams(max_tokens=40, ignore_eos=True)
        )
        assert completions[0].accepted_length > minimum


@pytest.mark.parametrize(
    ("pair", "policy", "requests", "engine"),
    [
        ("lookup", "static", "mixed", "torch"),
        ("lookup", "echo", "mixed", "openvino"),
        ("lookup", "static", "penalised", "openvino"),
        ("gemma3", "static", "mixed", "torch"),
        ("gemma3", "echo", "mixed", "openvino"),
    ],
)
def test_branches_beside_the_first_are_accepted(pair, policy, requests, engine, open_llm, plain):
    """A drafter that knows the text and ranks the right token anywhere, in a batch that is mostly accepted.

    Tokens of the path itself are penalised further down.
    """
    llm, count = open_llm(pair, policy, 3, engine), 6 if engine == "openvino" else 4
    prompts, params = (part[:count] for part in REQUESTS[requests]())
    wanted = plain(pair, requests)[:count]
    llm.loop.drafter = Foresight(llm.loop.batch, [p + w.token_ids for p, w in zip(prompts, wanted, strict=True)])
    assert_same(llm.generate(prompts, params), wanted)
    if pair == "lookup":
        assert llm.counters.accepted_length > (1.5 if requests == "penalised" else 1.3)


def test_beyond_a_window_openvino_verifies_single_paths(open_llm, plain):
    """It counts the rows of a window, of which siblings have one each."""
    llm = open_llm("gemma3", "static", 3)
    prompts, params = REQUESTS["mixed"]()
    wanted = plain("gemma3", "mixed")
    llm.loop.drafter = Foresight(llm.loop.batch, [p + w.token_ids for p, w in zip(prompts, wanted, strict=True)])
    seen, branched = llm.loop.target.run, {False: set(), True: set()}

    def run(call):
        for i, past in enumerate(call.past_lens):
            mask = call.tree_mask[call.tree_mask_begins[i] : call.tree_mask_begins[i + 1]]
            size = int(len(mask) ** 0.5)
            beyond = past + size > CHANGES["gemma3"]["sliding_window"]
            branched[bool(beyond)].add(size > 1 and mask.sum() < size * (size + 1) / 2)
        return seen(call)

    llm.loop.target.run = run
    assert_same(llm.generate(prompts, params), wanted)
    assert branched == {False: {False, True}, True: {False}}


def test_a_continuation_elsewhere_draws_the_same_text(llm_of):
    """The text so far as the prompt, as of a client that goes on at another server."""
    prompt = prompt_ids(12, 0)
    whole = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    ids = llm_of("self", "echo", 1).generate([prompt], whole)[0].token_ids
    for output in (1, 7, 16):
        rest = SamplingParams(max_tokens=24 - output, temperature=1.0, seed=5, ignore_eos=True)
        assert llm_of("self", "echo", 8).generate([[*prompt, *ids[:output]]], rest)[0].token_ids == ids[output:]


# -- penalties, biases and log-probabilities ----------------------------------------------------------------------


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
