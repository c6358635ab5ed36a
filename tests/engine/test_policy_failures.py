"""A policy of one's own that raises, or whose plans cannot be verified, costs the draft of a pass, and no text."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
from driving import SPECULATION_PAYS, assert_all_free, goodput_planner, prompt_ids

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.service.service import Service
from echo_trt.speculation.drafts import Draft
from echo_trt.speculation.planner import Explanation, Plan, Planner, StepContext
from echo_trt.speculation.super_tree import SuperTree

PROMPTS = [prompt_ids(length, length) for length in (20, 30, 25, 41)]
#: The policy drafts for every other request; ``speculate`` of its neighbours is off.
PARAMS = [SamplingParams(24, ignore_eos=True, speculate=i % 2 == 0, latency={"tpot_ms": 0.001}) for i in range(4)]


def chain(tree: SuperTree, node: np.ndarray, length: int) -> None:
    for token in range(5, 5 + length):
        node = tree.add(node, np.array([token]), np.zeros(1))


def too_large(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    for token in range(60):
        tree.add(request, np.array([token]), np.zeros(1))


def too_deep(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    chain(tree, request, 12)  # more than what is left at the end of a text


def twins(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    _, tokens = draft.expand_roots(request)
    tree.add(np.repeat(request, 3), np.repeat(tokens[0, :1], 3), np.zeros(3))


def upside_down(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    chain(tree, request, 2)
    tree.parent[-2] = len(tree) - 1


def of_another(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    chain(tree, request, 1)
    tree.parent[-1] = (request[0] + 1) % tree.num_requests


def at_a_wrong_depth(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    chain(tree, request, 1)
    tree.depth[-1] = 0


def rootless(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    tree.token[request] += 1


def in_floats(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    tree.token = tree.token.astype(np.float64)


def without_an_explanation(tree: SuperTree, draft: Draft, request: np.ndarray) -> None:
    chain(tree, request, 1)


class Wrong(Planner):
    name = "wrong"

    def __init__(self, spoil: Callable[[SuperTree, Draft, np.ndarray], None]):
        self._spoil = spoil

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        tree = SuperTree.from_roots(roots)
        request = np.flatnonzero(load.max_draft_len > 0)[:1]
        if len(request):
            self._spoil(tree, draft, request)
        tree, _ = tree.sorted_by_request(np.arange(len(tree))) if self._spoil is not upside_down else (tree, None)
        chances = np.ones(len(tree))
        left_out = self._spoil is without_an_explanation
        return Plan(tree, chances, Explanation(tree, chances, np.arange(0 if left_out else len(tree))))


@pytest.fixture(scope="module")
def texts(open_llm) -> list[list[int]]:
    return [c.token_ids for c in open_llm("close", "autoregressive", 1).generate(PROMPTS, PARAMS)]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "echo_trt.engine.core"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (too_large, "tokens, and a request has room for"),
        (too_deep, "longer than its request's max_draft_len"),
        (twins, "two children of a node have one token"),
        (upside_down, "parents before children"),
        (of_another, "parents before children"),
        (at_a_wrong_depth, "parents before children"),
        (rootless, "one for each root"),
        (in_floats, "int64 trees"),
        (without_an_explanation, "an explanation has each node"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_a_plan_that_cannot_be_verified_is_not(spoil, words, open_llm, texts, caplog):
    llm = open_llm("close", "autoregressive", 4)
    llm.loop.planner = Wrong(spoil)
    assert [c.token_ids for c in llm.generate(PROMPTS, PARAMS)] == texts
    assert llm.counters.planner_failures > 1
    (sentence,) = told(caplog)
    assert sentence.startswith("policy wrong fails (")
    assert words in sentence
    assert_all_free(llm.loop)


@pytest.mark.parametrize("name", ["plan", "observe", "admit", "begin"])
def test_a_policy_that_raises_costs_no_pass(name, open_llm, texts, caplog):
    def fail(*_: object) -> None:
        raise KeyError("momentum")

    llm = open_llm("close", "autoregressive", 3)  # one waits, so that its prompt is computed beside the others
    llm.loop.planner = planner = goodput_planner(llm, SPECULATION_PAYS)
    setattr(llm.loop.drafter if name == "begin" else planner, name, fail)
    assert [c.token_ids for c in llm.generate(PROMPTS, PARAMS)] == texts
    assert llm.counters.planner_failures > 0
    (sentence,) = told(caplog)
    assert "policy goodput fails (KeyError: 'momentum', at test_policy_failures.py:" in sentence
    assert_all_free(llm.loop)


@pytest.mark.parametrize("seated", [lambda pace: pace.wanted < 0, lambda pace: np.ones(9, bool)], ids=["none", "many"])
def test_seats_that_are_none_leave_all_in_the_pass(seated, open_llm, texts):
    llm = open_llm("close", "autoregressive", 4)
    llm.loop.planner = planner = goodput_planner(llm, SPECULATION_PAYS)
    planner.admit = lambda seats: seats.of(seated(seats.pace))
    assert [c.token_ids for c in llm.generate(PROMPTS, PARAMS)] == texts


def test_a_service_answers_under_a_policy_that_always_raises(open_llm, texts):
    from steered import submit

    logging.getLogger("echo_trt.engine.core").setLevel(logging.ERROR)
    llm = open_llm("close", "autoregressive", 3)
    llm.loop.planner = Wrong(lambda *_: 1 / 0)
    service = Service(llm)
    listeners = [submit(service, prompt, params)[1] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert [listener.token_ids for listener in listeners] == texts
    assert service.statistics().engine_failures == 0
    assert service.statistics().counters.planner_failures > 0
    service.close(0)
