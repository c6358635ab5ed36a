"""The target's word on random trees, against the same for one node at a time in plain Python."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from forests import path_to, super_trees
from grammar.walks import compiler, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from echo_trt.backends.cuda.device_rows import DeviceLogits
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.sampler import TargetOutput
from echo_trt.speculation.accept import accept
from echo_trt.speculation.sampling.draw import sample
from echo_trt.speculation.super_tree import SuperTree

VOCAB, CONTEXT = 12, 40
tokens = st.integers(0, VOCAB - 1)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.9]),
    seed=st.integers(0, 9),
    stop_token_ids=st.lists(tokens, max_size=3).map(tuple),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.75]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5, 0.5]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, 2.5]), max_size=3),
    min_tokens=st.sampled_from([0, 0, 4]),
    logprobs=st.none() | st.integers(0, VOCAB),
)


@st.composite
def calls(draw) -> tuple[TargetOutput, list[tuple[list[int], list[int], SamplingParams]]]:
    """Return a call over trees and single roots, and of each request its prompt, its text so far and its parameters."""
    tree = draw(super_trees(max_requests=4, max_nodes=14))
    requests = []
    batch = InputBatch(6, CONTEXT, 4, 1)
    slots = np.array(draw(st.permutations(range(6)))[: tree.num_requests])
    for slot in slots.tolist():
        prompt, history = draw(st.lists(tokens, min_size=1, max_size=6)), draw(st.lists(tokens, max_size=6))
        requests.append((prompt, history, draw(params)))
        text, own = [*prompt, *history], requests[-1][2]
        batch.tokens[slot, : len(text)] = text
        batch.length[slot], batch.prompt_length[slot] = len(text), len(prompt)
        batch.set_params(slot, own)
        batch.stop_tokens[slot, : len(own.stop_token_ids)] = own.stop_token_ids
    seed = draw(st.integers(0, 999))
    logits = np.random.default_rng(seed).normal(0, 2, (len(tree), VOCAB)).astype(np.float32)
    return TargetOutput(tree, slots, len(slots), {"logits": logits}, None, batch), requests


def history_at(tree: SuperTree, node: int, history: list[int]) -> list[int]:
    return history + [int(tree.token[n]) for n in path_to(tree, node)[1:]]


def choice(logits: list[float], prompt: list[int], history: list[int], own: SamplingParams) -> int:
    counts = Counter(history)
    for token in {*prompt, *history}:
        logits[token] *= 1 / own.repetition_penalty if logits[token] > 0 else own.repetition_penalty
    for token, times in counts.items():
        logits[token] -= own.presence_penalty + own.frequency_penalty * times
    for token, bias in own.logit_bias.items():
        logits[token] += bias
    if len(history) < own.min_tokens:
        for token in own.stop_token_ids:
            logits[token] = -np.inf
    each = (np.array([value]) for value in (own.temperature, own.top_k, own.top_p))
    position = np.array([len(prompt) + len(history)])
    minimum = np.array([own.min_p])
    return int(sample(np.array([logits], np.float32), *each, np.array([own.seed]), position, minimum)[0])


@given(calls(), st.data())
def test_every_node_by_itself(case, data):
    verified, requests = case
    tree, logits = verified.tree, verified.outputs["logits"]
    nodes = np.array(data.draw(st.lists(st.integers(0, len(tree) - 1), unique=True, min_size=1)))
    before = logits.copy()
    want = []
    for node in nodes.tolist():
        prompt, history, own = requests[tree.request[node]]
        want.append(choice(logits[node].tolist(), prompt, history_at(tree, node, history), own))
    assert verified.next_token(nodes).tolist() == want
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "limit",
    [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 3, "top_p": 0.7}],
    ids=lambda limit: " ".join(limit),
)
@pytest.mark.parametrize("on_device", [False, True])
def test_limits_count_the_tokens_that_a_grammar_allows(limit, on_device):
    """A draw is as if the logits had no tokens but those that the grammar allows, whatever would be drawn among all."""
    seeds, grammar = 100, compiler().begin({"regex": "[a-p]{3}|[0-9]"})
    logits = np.random.default_rng(1).normal(0, 2, (seeds, tokenizer().get_vocab_size())).astype(np.float32)
    batch = InputBatch(seeds, CONTEXT, 4, 1)
    batch.length[:], batch.prompt_length[:], batch.grammar[:] = 1, 1, grammar
    for slot in range(seeds):
        batch.set_params(slot, SamplingParams(temperature=1.0, seed=slot, **limit))
    tree = SuperTree.from_roots(np.ones(seeds, np.int64))
    own = DeviceLogits(torch.from_numpy(logits.copy())) if on_device else logits
    verified = TargetOutput(tree, np.arange(seeds), seeds, {"logits": own}, None, batch)
    temperature, top_k, top_p, seed, min_p = (
        batch.sampling[name] for name in ("temperature", "top_k", "top_p", "seed", "min_p")
    )
    ways = temperature, top_k, top_p, seed, batch.length, min_p
    allowed = np.unpackbits(grammar.mask, bitorder="little", count=logits.shape[1]).astype(bool)
    wanted = sample(np.where(allowed, logits, np.float32(-np.inf)), *ways)
    assert verified.next_token(np.arange(seeds)).tolist() == wanted.tolist()


@given(calls())
def test_rows_that_stay_on_the_device_say_the_same(case):
    verified, _ = case
    logits = verified.outputs["logits"]
    path, emitted = accept(verified.tree, verified.next_token)
    reported = verified.logprobs(path, emitted)
    verified.outputs["logits"] = DeviceLogits(torch.from_numpy(logits.copy()))
    again = accept(verified.tree, verified.next_token)
    assert [each.tolist() for each in again] == [path.tolist(), emitted.tolist()]
    for (request, entries), (_, wanted) in zip(verified.logprobs(path, emitted), reported, strict=True):
        for entry, other in zip(entries, wanted, strict=True):
            assert [entry.token, *(t for t, _ in entry.top)] == [other.token, *(t for t, _ in other.top)], request
            numbers = [entry.logprob, *(p for _, p in entry.top)]
            assert numbers == pytest.approx([other.logprob, *(p for _, p in other.top)], abs=1e-5)
    np.testing.assert_array_equal(np.asarray(verified.outputs["logits"]), logits)


@given(calls())
def test_logprobs_of_what_was_emitted(case):
    verified, requests = case
    path, emitted = accept(verified.tree, verified.next_token)
    reported = dict(verified.logprobs(path, emitted))
    assert set(reported) == {i for i, (_, _, own) in enumerate(requests) if own.logprobs is not None}
    for request, entries in reported.items():
        own = np.flatnonzero(verified.tree.request[path] == request)
        for position, entry in zip(own, entries, strict=True):
            wanted = log_softmax(verified.outputs["logits"][path[position]].astype(float))
            best = np.argsort(-wanted, kind="stable")[: requests[request][2].logprobs].tolist()
            assert (entry.token, [token for token, _ in entry.top]) == (emitted[position], best)
            numbers = [entry.logprob, *(logprob for _, logprob in entry.top)]
            assert numbers == pytest.approx(wanted[[entry.token, *best]], abs=1e-5)
