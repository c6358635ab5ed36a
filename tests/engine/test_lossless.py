"""Speculation changes when tokens come, never which: every policy, draft, batch and engine writes the same text."""

import itertools

import numpy as np
import pytest
import torch
from batches import PROMPTS, assert_same, mixed, penalised, structured
from driving import Foresight, add, assert_all_free, prompt_ids, run
from pairs import FOLDERS, PAIRS
from transformers import AutoModelForCausalLM

from echo_trt.engine.params import Completion, SamplingParams

SPECULATIVE = ("static", "dense", "fixed", "echo")
POLICIES = ("autoregressive", *SPECULATIVE)
BATCHES, ENGINES = (1, 3, 8), ("openvino", "torch")
REQUESTS = {"mixed": mixed, "penalised": penalised, "structured": structured}
#: Every pair with every policy; batch, engine and requests change along the diagonals, so that any two choices meet.
MATRIX = [
    (pair, policy, BATCHES[(i + j) % 3], ENGINES[(i + j) % 2], tuple(REQUESTS)[(i + 2 * j) % 3])
    for i, pair in enumerate(PAIRS)
    for j, policy in enumerate(POLICIES)
]


@pytest.fixture(scope="module")
def llm_of(open_llm):
    """LLMs that are used again and again, as a server would."""
    opened = {}

    def get(pair: str, policy: str, batch: int, engine: str = "openvino"):
        key = pair, batch, engine
        if key not in opened:
            opened[key] = open_llm(pair, batch=batch, engine=engine)
        opened[key].set_policy(policy)
        return opened[key]

    return get


@pytest.fixture(scope="module")
def plain(llm_of):
    """pair, requests -> what plain decoding answers, one request at a time."""
    known = {}

    def get(pair: str, requests: str) -> list[Completion]:
        key = FOLDERS[pair][0], requests
        if key not in known:
            known[key] = llm_of(pair, "autoregressive", 1).generate(*REQUESTS[requests]())
        return known[key]

    return get


@pytest.fixture(scope="module")
def plain_ids(plain):
    """pair -> what plain decoding writes to the mixed requests."""
    return lambda pair: [completion.token_ids for completion in plain(pair, "mixed")]


@pytest.mark.parametrize("target", ["target", "plain_target"])
def test_plain_decoding_is_the_models_own(target, networks, llm_of):
    pair = {FOLDERS[pair][0]: pair for pair in PAIRS}[target]
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


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize("policy", SPECULATIVE)
def test_branches_beside_the_first_are_accepted(policy, engine, open_llm, plain_ids):
    """A drafter that knows the text and ranks the right token anywhere, in a batch that is mostly accepted."""
    llm = open_llm("lookup", policy, 3, engine)
    prompts, params = mixed(6 if engine == "openvino" else 4)
    wanted = plain_ids("lookup")[: len(prompts)]
    llm.loop.drafter = Foresight(llm.loop.batch, [p + w for p, w in zip(prompts, wanted, strict=True)])
    assert [c.token_ids for c in llm.generate(prompts, params)] == wanted
    assert llm.counters.accepted_length > 1.3


@pytest.mark.parametrize("pair", ["self", "close", "dspark"])
def test_policies_may_change_at_every_iteration(pair, open_llm, plain_ids):
    llm = open_llm(pair, batch=3)
    prompts, params = mixed()
    policies = itertools.cycle(
        ["echo", "autoregressive", "static", "autoregressive", "autoregressive", "dense", "fixed"]
    )
    ids = {i: [] for i in range(len(prompts))}
    for delta in llm.stream(prompts, params):
        llm.set_policy(next(policies))
        if delta.completion:
            ids[delta.index] = delta.completion.token_ids
    assert list(ids.values()) == plain_ids(pair)


def test_text_depends_on_the_seed_and_not_on_the_company(llm_of):
    prompt, params = (
        prompt_ids(12, 0),
        [SamplingParams(max_tokens=16, temperature=1.0, seed=s, ignore_eos=True) for s in (1, 2, 1, 3, 2)],
    )
    alone = [llm_of("self", "echo", 1).generate([prompt], own)[0].text for own in params]
    together = [c.text for c in llm_of("self", "echo", 8).generate([prompt] * len(params), params)]
    assert alone == together
    assert alone[0] == alone[2]
    assert len(set(alone)) == 3


def test_a_continuation_elsewhere_draws_the_same_text(llm_of):
    """The text so far as the prompt, as of a client that goes on at another server."""
    prompt = prompt_ids(12, 0)
    whole = SamplingParams(max_tokens=24, temperature=1.0, seed=5, ignore_eos=True)
    ids = llm_of("self", "echo", 1).generate([prompt], whole)[0].token_ids
    for output in (1, 7, 16):
        rest = SamplingParams(max_tokens=24 - output, temperature=1.0, seed=5, ignore_eos=True)
        assert llm_of("self", "echo", 8).generate([[*prompt, *ids[:output]]], rest)[0].token_ids == ids[output:]


def test_requests_join_while_others_run(open_llm, plain_ids):
    loop = open_llm("close", batch=8).loop
    prompts, params = mixed()
    order = np.random.default_rng(0).permutation(len(prompts))
    added = {}
    for i in order:
        added[i] = add(loop, prompts[i], **vars(params[i]))
        run(loop, steps=2)
    run(loop)
    assert [added[i].generated for i in range(len(prompts))] == plain_ids("close")
    assert_all_free(loop)
