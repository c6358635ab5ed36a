"""Predicted outputs: where an answer stands in its prediction, and texts that no prediction changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from batches import REQUESTS, assert_same
from driving import add, assert_all_free, goodput_planner, machine, prompt_ids, run
from refusal import refused
from scipy.stats import chisquare
from speculation.machines import load_of

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.sources.predictions import PredictionSource, accepted

FILE, LOAD = list(range(100, 140)), load_of(1, epoch=np.array([0]))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (FILE, 40),
        ([*FILE[:10], 5, *FILE[11:]], 39),  # a token is replaced: its place is skipped
        (FILE[:10] + FILE[20:], 29),  # some are deleted: the first behind them is looked up
        ([*FILE[:10], 5, 6, 7, *FILE[10:]], 39),  # some are inserted
        ([5, 6, *FILE], 39),
        (FILE[20:] + FILE[:3], 19),  # only what is ahead is looked up
        ([7] * 50, 0),
        ([], 0),
    ],
)
def test_an_answer_is_followed_over_its_edits(answer, right):
    assert accepted(FILE, answer) == right
    assert accepted([], answer) == 0


def source_over(answer: list[int], prompt: int = 3, length: int = 16) -> tuple[PredictionSource, InputBatch]:
    """Make a source of one slot, whose text is a prompt and ``answer``."""
    batch = InputBatch(1, 200, 64, 1)
    batch.set_params(0, SamplingParams(prediction=FILE))
    batch.prompt_length[0], batch.length[0] = prompt, prompt + len(answer)
    batch.tokens[0, : batch.length[0]] = [1] * prompt + answer
    return PredictionSource(batch, length), batch


def test_chains_follow_the_text_and_grow_with_what_was_right():
    source, _ = source_over([])
    chains = source.propose(LOAD)
    assert chains.tokens.tolist() == [FILE[:16]]
    np.testing.assert_allclose(np.exp(chains.log_p.cumsum()), 1 / np.arange(2, 18))  # Laplace's rule of succession
    source, _ = source_over(FILE[:30])
    chains = source.propose(LOAD)
    assert chains.tokens.tolist() == [FILE[30:] + [-1] * 6]
    assert np.exp(chains.log_p[0, :10].sum()) > 0.7
    source, _ = source_over([7] * 20)
    assert np.exp(source.propose(LOAD).log_p[0, 0]) < 0.1  # 20 places were wrong
    assert (source_over(FILE)[0].propose(LOAD).tokens == -1).all()  # nothing is left


def test_a_text_that_comes_back_is_followed_from_its_own_tokens():
    answer = [*FILE[:8], 5, *FILE[9:14]]
    source, batch = source_over(answer)
    whole = source.propose(LOAD)
    batch.length[0] -= 6
    again = PredictionSource(batch, 16)
    again.propose(LOAD)
    batch.length[0] += 6
    for epoch in (0, 7):  # step by step, and afresh in another slot's place
        found = again.propose(replace(LOAD, epoch=np.array([epoch])))
        assert found.tokens.tolist() == whole.tokens.tolist()
        np.testing.assert_array_equal(found.log_p, whole.log_p)


@pytest.mark.parametrize("policy", ["goodput", "goodput-exact"])
@pytest.mark.parametrize("kind", ["mixed", "structured"])
def test_no_prediction_changes_a_text(kind, policy, open_llm, plain):
    llm = open_llm("close", "autoregressive", 3)
    prompts, params = REQUESTS[kind]()
    wanted = plain("close", kind)
    passes = {}
    for name in ("right", "half", "wrong"):
        predictions = [[*one.token_ids] for one in wanted]
        if name == "half":
            predictions = [[*ids[: len(ids) // 2], 9, *ids[len(ids) // 2 + 2 :]] for ids in predictions]
        if name == "wrong":
            predictions = [prompt_ids(60, seed) for seed in range(len(wanted))]
        llm.loop.planner = goodput_planner(llm, machine(0.01, 0.5), policy)
        before = llm.counters.iterations
        given = [replace(one, prediction=ids) for one, ids in zip(params, predictions, strict=True)]
        assert_same(llm.generate(prompts, given), wanted)
        passes[name] = llm.counters.iterations - before
        assert_all_free(llm.loop)
    assert passes["right"] <= passes["half"] <= passes["wrong"] > passes["right"]


def test_a_right_prediction_takes_long_steps(open_llm):
    """At one request a verification holds as many tokens as its price says, beyond the draft's depth."""
    llm = open_llm("close", "autoregressive", 1)
    prompt, params = prompt_ids(12, 0), SamplingParams(100, ignore_eos=True, temperature=1.0, seed=3)
    plain = llm.generate([prompt], params)[0]
    llm.loop.planner = goodput_planner(llm, machine(0.001, 0.5))
    given = replace(params, prediction=plain.token_ids, token_sources=True)
    answer = llm.generate([prompt], given)[0]
    assert answer.token_ids == plain.token_ids
    assert answer.accepted_length > 10
    assert "prediction" in {entry.source for entry in answer.token_sources}


def test_sampled_tokens_keep_their_distribution_under_a_prediction(open_llm):
    """Two tokens of four each, over seeds; the second is verified beside the prediction's, which is the likeliest."""
    llm, prompt, draws = open_llm("close", "autoregressive", 8), prompt_ids(12, 0), 400

    def likeliest(ids: list[int]) -> tuple[list[int], np.ndarray]:
        [answer] = llm.generate([ids], SamplingParams(1, logprobs=4))
        tokens, log_p = zip(*answer.logprobs[0].top, strict=True)
        return list(tokens), np.exp(log_p) / np.exp(log_p).sum()

    first, chances = likeliest(prompt)
    behind = [likeliest([*prompt, token]) for token in first]
    wanted = np.concatenate([p * chance for chance, (_, p) in zip(chances, behind, strict=True)])
    params = SamplingParams(3, ignore_eos=True, temperature=1.0, top_k=4, prediction=[first[0], behind[0][0][0], 5])
    llm.loop.planner = goodput_planner(llm, machine(0.01, 0.5))
    answers = llm.generate([prompt] * draws, [replace(params, seed=seed) for seed in range(draws)])
    outcome = {(one, two): 4 * i + k for i, one in enumerate(first) for k, two in enumerate(behind[i][0])}
    counts = np.bincount([outcome[tuple(answer.token_ids[:2])] for answer in answers], minlength=16)
    assert sum(answer.accepted_length > 1 for answer in answers) > 30
    assert chisquare(counts, draws * wanted).pvalue > 0.001


def test_a_text_stands_for_its_tokens(open_llm):
    llm = open_llm("close", "autoregressive", 1)
    [answer] = llm.generate(["the theme"], SamplingParams(4, prediction="the theme of a thing"))
    assert len(answer.token_ids) <= 4
    with refused("prediction", "holds token id 99999"):
        llm.generate(["the theme"], SamplingParams(4, prediction=[99999]))
    with refused("prediction", "100000 tokens", "maximum context length", "give the part"):
        llm.generate(["the theme"], SamplingParams(4, prediction=[5] * 100_000))


def test_a_preempted_request_goes_on_in_its_prediction(open_llm):
    llm = open_llm("close", "autoregressive", 1)
    prompt = prompt_ids(12, 0)
    wanted = llm.generate([prompt], SamplingParams(40, ignore_eos=True))[0].token_ids
    llm.loop.planner = goodput_planner(llm, machine(0.01, 0.5))
    request = add(llm.loop, prompt, prediction=wanted)
    events = run(llm.loop, 3)
    llm.loop.scheduler.preempt_least_urgent()
    events += run(llm.loop)
    assert [token for _, tokens in events for token in tokens] == request.generated == wanted
    assert request.verifications < 15
