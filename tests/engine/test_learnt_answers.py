"""Answers that are learnt while serving: what they propose, to whom, and texts that they do not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from batches import REQUESTS, assert_same
from driving import assert_all_free, goodput_planner, machine, prompt_ids, run
from speculation.machines import load_of

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request, Sender
from echo_trt.engine.sources.answers import CONTEXT, KEPT, POINTS, TABLES, AnswerSource, _chain, _learn

ANSWER = list(range(100, 140))


class Writing:
    """A source over requests whose texts a test writes."""

    def __init__(self, slots: int = 1, length: int = 16):
        self.batch, self._epoch = InputBatch(slots, 300, 64, 8), 0
        self.source = AnswerSource(self.batch, length)

    def begin(self, prompt: list[int], slot: int = 0, salt: bytes = b"") -> None:
        self._epoch += 1
        batch = self.batch
        batch.blocks.salts[slot], batch.admitted[slot] = salt, self._epoch
        batch.prompt_length[slot] = batch.length[slot] = len(prompt)
        batch.tokens[slot, : len(prompt)] = prompt

    def write(self, tokens: list[int], slot: int = 0) -> None:
        load = self.load(slot)
        self.source.propose(load)
        begin = int(self.batch.length[slot])
        self.batch.tokens[slot, begin : begin + len(tokens)] = tokens
        self.batch.length[slot] += len(tokens)
        self.source.observe(load)

    def load(self, slot: int = 0):
        return replace(load_of(1), slots=np.array([slot]), epoch=self.batch.admitted[[slot]])

    def proposed(self, slot: int = 0) -> list[int]:
        chains = self.source.propose(self.load(slot))
        return [token for row in chains.tokens.tolist() for token in row if token >= 0]


def test_an_answer_is_proposed_from_its_fourth_last_token_on_and_grows_sure():
    texts = Writing()
    texts.begin([1, 2, 3])
    texts.write(ANSWER[:20])
    texts.write(ANSWER[20:])
    texts.begin([7, 8, 9, *ANSWER[:CONTEXT]])  # behind another prompt
    assert texts.proposed() == ANSWER[CONTEXT : CONTEXT + 16]
    assert not texts.source.forces(texts.load())
    first = texts.source.propose(texts.load()).log_p[0, 0]
    texts.write(ANSWER[CONTEXT:12])
    assert texts.source.forces(texts.load())
    assert texts.source.propose(texts.load()).log_p[0, 0] > first
    texts.write([5])
    assert texts.proposed() == []
    assert not texts.source.forces(texts.load())


def test_nobody_is_proposed_what_another_salt_has_written():
    texts = Writing()
    for salt in (b"alice", b"bob"):
        texts.begin(ANSWER[:CONTEXT], salt=salt)
        assert texts.proposed() == []
        texts.write(ANSWER[CONTEXT:])
    for number in range(TABLES - 1):
        texts.begin(ANSWER[:CONTEXT], salt=b"%d" % number)
        assert texts.proposed() == []
    texts.begin(ANSWER[:CONTEXT], salt=b"bob")
    assert texts.proposed() == ANSWER[CONTEXT : CONTEXT + 16]
    texts.begin(ANSWER[:CONTEXT], salt=b"alice")  # others have come since
    assert texts.proposed() == []
    assert len(texts.source.dump()) == KEPT


def test_a_preempted_text_is_learnt_once():
    texts = Writing()
    texts.begin(ANSWER[:CONTEXT])
    texts.write(ANSWER[CONTEXT:20])
    once = texts.source.dump()
    for _ in range(3):  # in a slot again, with its text so far
        texts.batch.admitted[0] += 1
        texts.source.propose(texts.load())
        texts.source.observe(texts.load())
    again = texts.source.dump()
    different = [np.count_nonzero(again[name] != cells) for name, cells in once.items()]
    assert different == [1]  # its last token


def test_a_request_without_drafts_holds_nobody_up():
    texts = Writing()
    for _ in range(2):
        texts.begin(ANSWER[:CONTEXT])
        texts.write(ANSWER[CONTEXT:])
    assert texts.source.forces(texts.load())
    assert not texts.source.forces(replace(texts.load(), max_draft_len=np.zeros(1, np.int64)))


def test_what_does_not_follow_any_more_gives_way():
    table, text = np.zeros((1, 8), np.uint64), np.array([*range(1, CONTEXT + 1), 9], np.int32)
    for token, times in ((9, 300), (5, POINTS)):
        text[-1] = token
        for _ in range(times):
            _learn(table, text, CONTEXT, len(text), 0)
    tokens, log_p = np.full(1, -1), np.zeros(1)
    _chain(table, text[:CONTEXT].astype(np.int64), 0, tokens, log_p)
    assert tokens.tolist() == [5]


def test_samples_of_one_prompt_propose_to_each_other():
    texts = Writing(2)
    for slot in range(2):
        texts.begin([1, 2, 3, 4], slot)
        texts.source.propose(texts.load(slot))
    texts.write(ANSWER[:8], 0)
    assert texts.proposed(1) == ANSWER[:8]


def test_the_commoner_of_two_tokens_stands_and_a_full_bucket_gives_up_its_rarest():
    text = np.array([*range(1, CONTEXT + 1), 9], np.int32)
    table = np.zeros((1, 8), np.uint64)

    def proposed(context: list[int]) -> list[int]:
        tokens, log_p = np.full(2, -1), np.zeros(2)
        _chain(table, np.array(context), 0, tokens, log_p)
        return tokens.tolist()

    for token in (9, 9, 5):
        text[-1] = token
        _learn(table, text, CONTEXT, len(text), 0)
    assert proposed([1, 2, 3, 4]) == [9, -1]
    for token in (5, 5):
        text[-1] = token
        _learn(table, text, CONTEXT, len(text), 0)
    assert proposed([1, 2, 3, 4]) == [5, -1]
    _learn(table, text, CONTEXT, len(text), 0)
    for first in range(20, 40):
        _learn(table, np.array([first, 2, 3, 4, 6], np.int32), CONTEXT, len(text), 0)
    assert proposed([1, 2, 3, 4]) == [5, -1]
    assert proposed([39, 2, 3, 4]) == [6, -1]
    assert proposed([20, 2, 3, 4]) == [-1, -1]


def learning(llm: LLM, policy: str = "goodput", draft: float = 0.5) -> LLM:
    llm.networks = replace(llm.networks, learns_answers=True)
    llm.loop.planner = goodput_planner(llm, machine(0.01, draft), policy)
    return llm


@pytest.mark.parametrize("policy", ["goodput", "goodput-exact"])
@pytest.mark.parametrize("kind", ["mixed", "structured", "penalised"])
def test_no_learnt_answer_changes_a_text(kind, policy, open_llm, plain):
    llm, passes = learning(open_llm("close", "autoregressive", 3), policy), []
    for _ in range(3):
        before = llm.counters.iterations
        assert_same(llm.generate(*REQUESTS[kind]()), plain("close", kind))
        passes.append(llm.counters.iterations - before)
        assert_all_free(llm.loop)
    assert passes[2] < passes[0]


def test_the_same_answer_takes_few_passes_for_its_sender_alone_and_after_a_restart(open_llm):
    params = SamplingParams(100, ignore_eos=True, temperature=1.0, seed=3, token_sources=True)

    def passes(llm: LLM, salt: bytes) -> int:
        request = Request("r", np.array(prompt_ids(12, 0)), params, sender=Sender(salt, salt))
        llm.prepare(request)
        llm.loop.scheduler.add(request)
        run(llm.loop)
        return request.verifications

    llm = learning(open_llm("close", "autoregressive", 1))
    first = passes(llm, b"alice")
    assert passes(llm, b"alice") < first / 2
    assert passes(llm, b"bob") > first / 2
    kept = llm.loop.planner.dump()
    later = learning(open_llm("close", "autoregressive", 1))
    later.loop.planner.load(kept)
    assert passes(later, b"alice") < first / 2
    assert passes(later, b"carol") > first / 2
