"""Requests that wait for their grammars: deadlines and departures count meanwhile, and nobody else waits with them."""

from __future__ import annotations

from typing import Any

import pytest
from driving import prompt_ids
from steered import LONG, Listener, submit

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.service import grammars
from echo_trt.engine.service.job import Job, Overloaded
from echo_trt.engine.service.service import Service
from echo_trt.grammar import compiler

ANY_OBJECT = {"json_object": True}


def slow(number: int) -> dict[str, Any]:
    """Return a schema that takes a quarter of a second to compile, and is no other's."""
    return {"json": {"type": "array", "items": {"type": "number", "multipleOf": 29989 - 2 * number}}}


def ask(service: Service, structured: dict[str, Any], **more: Any) -> tuple[Job, Listener]:
    return submit(service, prompt_ids(6, 1), SamplingParams(4, structured=structured), **more)


def compiled(service: Service, numbers: range) -> list[int]:
    """Those of the slow grammars that have been compiled."""
    return [i for i in numbers if not service.llm.grammars.to_compile(slow(i))]


def test_what_is_compiled_already_waits_for_no_compiling(start):
    service, _ = start()
    assert ask(service, ANY_OBJECT)[1].end
    draft_lag = [ask(service, slow(i)) for i in range(3)]
    known, plain = ask(service, ANY_OBJECT)[1], submit(service, prompt_ids(6, 1), SamplingParams(4))[1]
    assert known.end.reason == plain.end.reason == "length"
    assert not draft_lag[-1][1].done.is_set()
    assert [listener.end.reason for _, listener in draft_lag] == ["length"] * 3


def test_no_request_waits_for_the_tokenizer_to_be_read(start, monkeypatch):
    """That holds Python's lock, and so all streams, for most of a second where the vocabulary is large."""
    service, _ = start()

    def held(*_: Any, **__: Any) -> None:
        raise AssertionError("the tokenizer is read for a request")

    monkeypatch.setattr(compiler, "LLTokenizer", held)
    assert ask(service, {"regex": "[ab]{9}"})[1].end.reason == "length"


def test_priority_comes_before_arrival(start):
    service, _ = start()
    first, late, urgent = ask(service, slow(0)), ask(service, slow(1)), ask(service, slow(2), priority=-1)
    assert first[1].end
    assert urgent[1].end
    assert not late[1].done.is_set()


def test_requests_of_one_grammar_wait_for_it_together(start, bundle_of):
    service, _ = start()
    expected = LLM(bundle_of("close"), "autoregressive", 1).generate(
        [prompt_ids(6, 1)], SamplingParams(4, structured=slow(0))
    )[0]
    for listener in [ask(service, slow(0))[1] for _ in range(5)]:
        assert (listener.text, listener.end.reason) == (expected.text, expected.finish_reason)


def test_too_many_grammars_are_refused_and_plain_requests_are_not(start, monkeypatch):
    monkeypatch.setattr(grammars, "MAX_GRAMMARS", 2)
    service, _ = start(batch=1, queue=2)
    waiting = [ask(service, slow(i)) for i in range(2)]
    with pytest.raises(Overloaded, match="2 grammars wait"):
        ask(service, slow(9))
    waiting.append(ask(service, slow(1)))  # for one of those
    with pytest.raises(Overloaded, match="2 requests wait"):
        ask(service, slow(1))
    plain = [submit(service, prompt_ids(6, i), SamplingParams(4))[1] for i in range(3)]
    assert [listener.end.reason for listener in plain] == ["length"] * 3
    assert [listener.end.reason for _, listener in waiting] == ["length"] * 3


def test_nothing_is_compiled_for_a_client_that_has_left(start):
    service, _ = start()
    _, (gone, listener) = ask(service, slow(0)), ask(service, slow(1))
    service.cancel(gone)
    assert listener.end.reason == "cancelled"
    assert ask(service, slow(2))[1].end.reason == "length"
    assert compiled(service, range(3)) == [0, 2]


def test_an_engine_that_fails_leaves_requests_with_their_grammars(start):
    service, steered = start()
    steered.fail = lambda call: steered.passes == 2
    running, requested = submit(service, prompt_ids(6, 2), LONG)[1], ask(service, slow(0))[1]
    assert (running.end.reason, requested.end.reason) == ("length", "length")
    assert service.statistics().engine_failures == 1
    assert len(requested.token_ids) == 4


def test_closing_ends_what_waits(start):
    service, _ = start()
    waiting = [ask(service, slow(i))[1] for i in range(9)]
    service.close(0)
    assert {listener.end.reason for listener in waiting} == {"cancelled"}
    assert len(compiled(service, range(9))) < 5
