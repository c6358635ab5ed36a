"""Tokens of an iteration are told while the next pass runs: each once, in order, whatever ends their request."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from driving import prompt_ids
from steered import LONG, submit

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams


def test_tokens_are_told_while_the_next_pass_runs(start):
    service, engine = start(batch=2)
    engine.open.clear()
    _, plain = submit(service, prompt_ids(6, 0))
    _, stopping = submit(service, prompt_ids(6, 1), replace(LONG, stop=("no text has this",)))
    reported, tell = [], service._report_due
    engine.overlap(lambda: (reported.append((len(service._due), len(plain.events))), tell()))
    engine.open.let(6)
    assert reported[-1][0] == 2, "both requests' tokens wait for a pass"
    assert len(plain.events) == reported[-1][1] + 1
    before, open_too = len(plain.token_ids_so_far), len(stopping.token_ids_so_far)
    engine.open.let(1)
    assert len(plain.token_ids_so_far) > before
    assert len(stopping.token_ids_so_far) > open_too
    engine.open.set()
    assert [len(listener.token_ids) for listener in (plain, stopping)] == [100, 100]
    assert not service._due


@pytest.mark.parametrize("early", [True, False])
def test_tokens_are_told_once_where_the_next_pass_fails(early, start, bundle_of):
    """Also where it fails before it has called back, while tokens wait to be told."""
    service, engine = start(batch=2)
    engine.early = early
    engine.fail = lambda call: engine.passes in (6, 20)
    prompts = [prompt_ids(6, seed) for seed in (0, 1)]
    reported = [submit(service, prompt)[1] for prompt in prompts]
    expected = LLM(bundle_of("close"), "autoregressive", 1).generate(prompts, LONG)
    for listener, wanted in zip(reported, expected, strict=True):
        assert (listener.token_ids, listener.text) == (wanted.token_ids, wanted.text)
    assert service.statistics().engine_failures == 2


def test_an_end_has_the_time_of_its_tokens(start):
    service, engine = start(batch=2)
    engine.open.clear()
    _, short = submit(service, prompt_ids(6, 0), SamplingParams(1, ignore_eos=True))
    _, long = submit(service, prompt_ids(6, 1))
    engine.open.let(1)
    reported = time.monotonic()
    time.sleep(0.2)
    engine.open.set()
    assert short.end
    assert short.events[-1].time < reported + 0.1
    assert long.end
