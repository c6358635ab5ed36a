"""The simulated fleet: its arithmetic on traces that can be worked out, and what a router is worth."""

from __future__ import annotations

import numpy as np
import pytest

from echo_trt_lab.simulation.fleet import (
    ConversationTurn,
    KvRouter,
    RoundRobin,
    Speed,
    TraceSettings,
    make_trace,
    simulate_fleet,
)

SPEED = Speed((1, 2, 4), (10.0, 16.0, 20.0), 0.01, 100_000)


def turn(conversation: int, arrival: float, number: int = 0, **more: int) -> ConversationTurn:
    given = {"family": 0, "prompt": 101, "shared": 64, "answer": 11} | more
    return ConversationTurn(conversation=conversation, number=number, arrival=arrival, **given)


def test_one_request_takes_its_prompt_and_then_a_token_at_a_time():
    run = simulate_fleet([[turn(0, 5.0)]], 1, SPEED, RoundRobin())
    [outcome] = run.outcomes
    assert outcome.first == pytest.approx(1.01)
    assert outcome.whole == pytest.approx(1.01 + 10 / 10)
    assert outcome.cached == 0


def test_requests_share_a_replica_s_rate_and_stand_while_a_prompt_is_computed():
    run = simulate_fleet([[turn(0, 0.0)], [turn(1, 0.5, family=1)]], 1, SPEED, RoundRobin())
    first, second = sorted(run.outcomes, key=lambda outcome: outcome.turn.conversation)
    assert first.first == pytest.approx(1.01)
    assert second.first == pytest.approx(2.02 - 0.5)
    # Both have 10 tokens to go once the second prompt is there, at 16 tokens per second together.
    assert first.whole == pytest.approx(2.02 + 20 / 16)
    assert second.whole + 0.5 == pytest.approx(first.whole)


def test_an_answer_that_ends_as_another_request_comes_is_followed_by_its_next_turn():
    speed = Speed((1, 2), (8.0, 16.0), 1 / 64, 100_000)
    talk = [turn(0, 0.0, prompt=64, shared=32), turn(0, 1.0, 1, prompt=96, shared=32)]
    other = [turn(1, 1 + 10 / 8, family=1)]  # when the first answer ends
    run = simulate_fleet([talk, other], 1, speed, RoundRobin())
    assert sorted((o.turn.conversation, o.turn.number) for o in run.outcomes) == [(0, 0), (0, 1), (1, 0)]


def test_a_later_turn_finds_what_was_said_and_a_family_its_beginning():
    talk = [turn(0, 0.0), turn(0, 1.0, 1, prompt=150)]
    other = [turn(1, 50.0)]
    run = simulate_fleet([talk, other], 1, SPEED, KvRouter())
    cached = {(o.turn.conversation, o.turn.number): o.cached for o in run.outcomes}
    assert cached == {(0, 0): 0, (0, 1): 96, (1, 0): 64}  # whole blocks of 112 and of 64 tokens
    assert run.home == 1


def test_a_full_cache_forgets_what_was_used_longest_ago():
    talks = [[turn(0, 0.0), turn(0, 100.0, 1, prompt=150)], [turn(1, 20.0, family=1)], [turn(2, 40.0, family=2)]]
    for max_draft_len, found in ((600, 96), (300, 0)):
        run = simulate_fleet(talks, 1, Speed((1,), (10.0,), 0.01, max_draft_len), KvRouter())
        assert [o.cached for o in run.outcomes if o.turn.number == 1] == [found]


def test_the_kv_router_sends_turns_home_and_computes_fewer_prompts():
    trace = make_trace(TraceSettings(rate=0.3, seconds=120))
    speed = Speed((1, 4, 16), (60.0, 150.0, 300.0), 0.002, 20_000)
    runs = {kind: simulate_fleet(trace, 4, speed, kind()) for kind in (RoundRobin, KvRouter)}
    turns = sum(map(len, trace))
    assert all(len(run.outcomes) == turns for run in runs.values())
    blind, knowing = runs[RoundRobin], runs[KvRouter]
    assert knowing.home > 0.6 > 0.4 > blind.home
    assert knowing.cached > blind.cached + 0.05
    assert knowing.first_percentile(50) < blind.first_percentile(50)
    again = simulate_fleet(trace, 4, speed, KvRouter())
    assert np.array_equal(again.first, knowing.first)


def test_a_trace_has_its_rate_and_its_bursts():
    settings = TraceSettings(rate=5, seconds=600)
    begins = np.array([turns[0].arrival for turns in make_trace(settings)])
    assert len(begins) == pytest.approx(3000, rel=0.1)
    bursts = settings.bursts
    busy = (begins % bursts.period < bursts.length).mean()
    assert busy == pytest.approx(bursts.height * bursts.length / bursts.period, rel=0.1)
