"""Synthetic text in the real loop: the same under every policy, draft and engine, and accepted as the table says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from batches import assert_same, mixed, penalised
from driving import echo_planner, prompt_ids
from refusal import refused

from echo_trt.engine.drafters.levels import LevelsDrafter
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.models.tokenizer import added_tokens
from echo_trt_lab.synthetic_engine import SyntheticEngine, propose, rates_given

RATES = "0.8,0.7,0.5"
GREEDY = SamplingParams(max_tokens=60, ignore_eos=True)


def opened(bundle: Path, policy: str | None, batch: int, rates: str = RATES) -> LLM:
    with rates_given(rates):
        return LLM(bundle, policy, batch)


@pytest.fixture(scope="module")
def synthetic(bundle_of):
    """pair, policy, batch -> an LLM whose text is synthetic."""
    known: dict[tuple[str, int], LLM] = {}

    def get(pair: str, policy: str, batch: int = 3) -> LLM:
        key = pair, batch
        if key not in known:
            known[key] = opened(bundle_of(pair), policy, batch)
        known[key].set_policy(policy)
        return known[key]

    return get


@pytest.fixture(scope="module")
def plain_text(synthetic):
    """pair, requests -> what plain decoding answers, one request at a time."""
    return lambda pair, requests: synthetic(pair, "autoregressive", 1).generate(*requests())


@pytest.mark.parametrize("requests", [mixed, penalised])
@pytest.mark.parametrize(
    ("pair", "policy", "batch"),
    [
        ("eagle3", "static", 1),
        ("eagle3", "echo", 8),
        ("eagle3", "goodput", 3),
        ("model", "echo", 3),
        ("dflash", "echo", 3),
        ("dspark", "static", 8),
    ],
)
def test_every_policy_writes_plain_decodings_text(pair, policy, batch, requests, synthetic, plain_text):
    llm = synthetic(pair, policy, batch)
    wanted = plain_text(pair, requests)
    assert_same(llm.generate(*requests()), wanted)


@pytest.mark.parametrize("policy", ["static", "echo", "goodput"])
def test_levels_on_the_device_draft_the_same_text(policy, open_llm, synthetic, plain_text):
    """Beams are chosen where the scores are, among the text's own candidates, also behind a gate."""
    llm, text = open_llm("eagle3", policy, 4, "resident"), synthetic("eagle3", "static").networks.text
    assert isinstance(llm.loop.drafter, LevelsDrafter)
    llm.loop.target = SyntheticEngine(llm.loop.target, text, llm.loop.batch)
    propose(llm.loop.drafter, text)
    prompts, params = mixed()
    assert_same(llm.generate(prompts, params), plain_text("eagle3", mixed))
    if policy != "goodput":  # which measures what passes take
        assert accepted_length(llm) == pytest.approx(accepted_length(synthetic("eagle3", policy, 4)), abs=0.02)


def accepted_length(llm: LLM) -> float:
    prompts = [prompt_ids(9 + i, i) for i in range(12)]
    before = llm.counters.copy()
    llm.generate(prompts, GREEDY)
    emitted = llm.counters.emitted_tokens - before.emitted_tokens
    return emitted / (llm.counters.verifications - before.verifications)


def test_acceptance_is_what_the_table_says(synthetic):
    """By depth, in chains that are always verified whole."""
    llm, reached, accepted = synthetic("eagle3", "static", 8), Counter(), Counter()
    llm.loop.planner = echo_planner(max_depth=5, beams=1, width=1, per_request=6)

    def note(trace) -> None:
        tree, path = trace.iteration.plan.tree, set(trace.iteration.path.tolist())
        for node in range(len(tree)):
            if tree.depth[node] and int(tree.parent[node]) in path:
                reached[int(tree.depth[node])] += 1
                accepted[int(tree.depth[node])] += node in path

    llm.loop.step_callback = note
    llm.generate([prompt_ids(5 + i % 40, i) for i in range(96)], SamplingParams(max_tokens=100, ignore_eos=True))
    llm.loop.step_callback = None
    for depth, rate in enumerate((0.8, 0.7, 0.5, 0.5, 0.5), 1):
        noise = 4 * np.sqrt(rate * (1 - rate) / reached[depth])
        assert accepted[depth] / reached[depth] == pytest.approx(rate, abs=noise), depth
    assert reached[1] > 2000


def test_texts_differ_by_seed_and_by_prompt_and_have_no_end(synthetic):
    llm = synthetic("eagle3", "echo", 3)
    prompts = [prompt_ids(9, 1), prompt_ids(9, 2), prompt_ids(9, 1), prompt_ids(9, 1)]
    params = [SamplingParams(60, seed=seed, temperature=1.0) for seed in (0, 0, 0, 1)]
    texts = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert texts[0] == texts[2]
    assert len({*map(tuple, texts)}) == 3
    assert all(len(text) == 60 for text in texts)
    assert not {*llm.manifest.eos_token_ids, *added_tokens(llm.tokenizer).values()} & set().union(*texts)


def test_text_goes_on_after_a_preemption(with_limits):
    """The pool holds two of four requests, and the others are computed again."""
    prompts = [prompt_ids(20 + i, i) for i in range(4)]
    roomy = opened(with_limits("eagle3"), "static", 4).generate(prompts, GREEDY)
    folder = with_limits("close", kv_blocks=9)
    tight = opened(folder, "static", 4)
    assert_same(tight.generate(prompts, GREEDY), roomy)
    assert tight.counters.preemptions > 0


def test_where_a_grammar_applies_the_models_choice_among_its_tokens_counts(synthetic):
    params = SamplingParams(max_tokens=8, structured={"choice": ["yes", "no"]})
    [completion] = synthetic("eagle3", "echo", 3).generate("is it?", params)
    assert completion.text in ("yes", "no")


def test_log_probabilities_are_the_models(synthetic):
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2)
    [completion] = synthetic("eagle3", "echo", 3).generate([[5, 6, 7]], params)
    assert [entry.token for entry in completion.logprobs] == completion.token_ids
    assert all(entry.logprob <= entry.top[0][1] and len(entry.top) == 2 for entry in completion.logprobs)


def test_rates_that_a_bundle_has_no_use_for_are_refused(bundle_of):
    with refused("rate is 0.7", "draft", "is lookup", "--draft"):
        opened(bundle_of("lookup"), None, 1, "0.7")
    with refused("ECHO_TRT_SYNTHETIC_TEXT is 'often'", "0.75"):
        opened(bundle_of("eagle3"), None, 1, "often")
