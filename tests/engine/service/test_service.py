"""One engine thread for all: the text of the offline interface whatever happens to neighbours, and one end each."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from driving import prompt_ids
from refusal import refused
from steered import LONG, SECONDS, Listener, submit
from waiting import wait_until

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, SamplingParams
from echo_trt.engine.request import FIRST, Event, Sender
from echo_trt.engine.service.job import Job, Overloaded
from echo_trt.engine.service.service import Service
from echo_trt.speculation.pack import ForwardBatch

PROBE = SamplingParams(1, ignore_eos=True)


@pytest.fixture(scope="module")
def offline(bundle_of) -> LLM:
    return LLM(bundle_of("close"), "autoregressive", 1)


CASES = [
    (
        prompt_ids(5 + i * 3, i),
        SamplingParams(
            20 + i,
            temperature=0.9 * (i % 2),
            seed=i,
            stop=("e", "th") if i % 3 == 2 else (),
            frequency_penalty=0.5 * (i % 4 == 1),
            logprobs=2 if i % 5 < 2 else None,
        ),
    )
    for i in range(12)
]


@pytest.fixture(scope="module")
def truths(offline) -> list[Completion]:
    """Return what plain decoding says in CASES."""
    return [offline.generate([prompt], params)[0] for prompt, params in CASES]


def assert_reported(listener: Listener, expected: Completion, reported: int = 0) -> None:
    """Check a request of which another engine has told ``reported`` tokens."""
    assert listener.token_ids == expected.token_ids[reported:]
    assert expected.text.endswith(listener.text)
    assert reported or expected.text == listener.text
    rest = [entry.logprob for entry in expected.logprobs or []][reported:]
    assert listener.logprobs == pytest.approx(rest, abs=1e-4)
    assert (listener.end.reason, listener.end.completion_tokens) == (expected.finish_reason, len(expected.token_ids))


def all_answered(service: Service, truths: list[Completion]) -> None:
    """Every case gets the text of plain decoding."""
    with ThreadPoolExecutor(6) as pool:  # any thread may submit
        reported = [pair[1] for pair in pool.map(lambda case: submit(service, *case), CASES)]
    for (prompt, _), listener, expected in zip(CASES, reported, truths, strict=True):
        assert_reported(listener, expected)
        assert listener.end.prompt_tokens == len(prompt)


def test_text_is_that_of_the_offline_interface(start, truths):
    service, _ = start()
    all_answered(service, truths)
    assert sum(service.statistics().ended.values()) == len(CASES)
    assert 0 < (end := submit(service, [5], PROBE)[1].end).queue_seconds < end.first_token_seconds


@pytest.mark.parametrize("reported", [1, 7, 15])
def test_an_answer_that_another_engine_began_goes_on_as_if_this_one_had(start, offline, reported):
    """Draws, penalties, limits, stop strings that the seam cuts in two, text and counts."""
    service, _ = start()
    for i, (prompt, params) in enumerate(CASES):
        params = replace(params, min_tokens=12 * (i % 3 == 1))
        expected = offline.generate([prompt], params)[0]
        if reported < len(expected.token_ids):
            _, listener = submit(service, prompt, params, generated=expected.token_ids[:reported])
            assert_reported(listener, expected, reported)
            assert listener.end.prompt_tokens == len(prompt)


def test_an_answer_of_which_nothing_is_left_to_say_ends_at_once(start):
    service, _ = start()
    _, listener = submit(service, prompt_ids(10, 1), SamplingParams(5, ignore_eos=True), generated=prompt_ids(5, 2))
    assert (listener.end.reason, listener.token_ids) == ("length", [])
    assert listener.end.completion_tokens == 5


def test_what_another_engine_told_must_fit_the_context(start):
    service, _ = start()
    with refused("maximum context length"):
        submit(service, prompt_ids(100, 1), generated=prompt_ids(60, 2))
    with refused("token id 100000"):
        submit(service, prompt_ids(10, 1), generated=[100_000])


def test_drafted_tokens_are_counted_by_request(start):
    service, _ = start(policy="echo")
    reported = [submit(service, prompt_ids(6, seed))[1] for seed in range(5)]
    ends = [listener.end for listener in reported]
    counters = service.loop.counters
    assert sum(sum(end.drafted) for end in ends) == counters.drafted_tokens > 0
    assert sum(end.verifications for end in ends) == counters.verifications
    assert Counter(n for end in ends for n in end.accepted) == counters.accepted
    for end in ends:
        assert sum(end.accepted) == end.completion_tokens - end.verifications
        assert all(0 <= accepted <= drafted for accepted, drafted in zip(end.accepted, end.drafted, strict=True))


def test_cancelling_frees_blocks_before_the_next_pass(start):
    service, engine = start(batch=2)
    engine.open.clear()
    first, gone = submit(service, prompt_ids(100, 1), SamplingParams(50, ignore_eos=True))
    _, stays = submit(service, prompt_ids(6, 2))
    waiting, never = submit(service, prompt_ids(6, 3))
    engine.open.let(10)
    held = service.statistics().blocks_used
    service.cancel(first)
    service.cancel(first)
    service.cancel(waiting)
    engine.open.let(1)
    assert service.statistics().blocks_used < held
    assert service.statistics().running == 1
    engine.open.set()
    assert gone.end.reason == never.end.reason == "cancelled"
    assert gone.end.cached_tokens == never.end.cached_tokens == 0
    assert gone.end.completion_tokens == len(gone.token_ids) > 0 == never.end.completion_tokens
    assert stays.end.reason == "length"
    service.cancel(first)


def test_a_crowd_may_come_while_all_places_are_free(start):
    service, engine = start(batch=3, queue=1)
    engine.open.clear()
    reported = [submit(service, prompt_ids(6, i))[1] for i in range(4)]
    with pytest.raises(Overloaded, match="queue is full, 1 requests wait"):
        submit(service, prompt_ids(6, 4))
    engine.open.set()
    assert [listener.end.reason for listener in reported] == ["length"] * 4


def test_a_probe_finds_no_queue_too_full_and_waits_for_no_place(start):
    service, engine = start(batch=2, queue=1)
    engine.open.clear()
    reported = [submit(service, prompt_ids(6, i))[1] for i in range(3)]
    engine.open.let(2)
    with pytest.raises(Overloaded):
        submit(service, prompt_ids(6, 3))
    _, probe = submit(service, [0], PROBE, priority=FIRST)
    assert not probe.done.wait(0.3), "the engine stands still"
    engine.open.let(2)
    assert probe.end.reason == "busy"
    assert not any(listener.done.is_set() for listener in reported)
    engine.open.set()
    assert [listener.end.completion_tokens for listener in reported] == [100] * 3
    assert service.statistics().ended == {"length": 3}


def test_a_probe_is_counted_nowhere(start):
    service, engine = start()
    assert submit(service, prompt_ids(6, 1), SamplingParams(4))[1].end
    before = service.statistics()
    engine.open.clear()
    job, listener = submit(service, [0], PROBE, priority=FIRST)
    wait_until(lambda: job.request.slot >= 0)
    assert service.statistics().running == 0
    engine.open.set()
    assert listener.end.reason == "length"
    after = service.statistics()
    assert after.ended == before.ended == {"length": 1}
    for name in ("asked_tokens", "prompt_tokens", "emitted_tokens", "verifications", "verified_tokens"):
        assert getattr(after.counters, name) == getattr(before.counters, name), name
    assert after.counters.iterations > before.counters.iterations


def test_slots_are_shared_by_tenants(start):
    """Who has the fewest running comes next; a tenant's own requests come in their order."""
    service, engine = start(batch=2)
    engine.open.clear()
    one = SamplingParams(3, ignore_eos=True)
    asked = [submit(service, prompt_ids(6, i), one, sender=Sender(b"alice")) for i in range(5)]
    asked += [submit(service, prompt_ids(6, i), one, sender=Sender(b"bob")) for i in range(2)]
    urgent = submit(service, prompt_ids(6, 9), one, sender=Sender(b"alice"), priority=-1)
    engine.open.set()
    assert {listener.end.reason for _, listener in (*asked, urgent)} == {"length"}
    order = sorted([*asked, urgent], key=lambda each: each[0].taken)
    names = [job.tenant for job, _ in order]
    assert names[:4].count(b"bob") >= 1
    assert names[:6].count(b"bob") == 2
    alice = [job for job, _ in order if job.tenant == b"alice"]
    assert alice.index(urgent[0]) <= 2
    assert [job.request.id for job in alice if job is not urgent[0]] == [0, 1, 2, 3, 4]


def test_one_tenant_leaves_a_slot_to_those_that_have_come_lately(start):
    service, engine = start(batch=8)
    assert submit(service, prompt_ids(6, 0), SamplingParams(3), sender=Sender(b"bob"))[1].end
    engine.open.clear()
    asked = [submit(service, prompt_ids(6, i), sender=Sender(b"alice")) for i in range(9)]
    engine.open.let(2)
    _, late = submit(service, prompt_ids(6, 9), SamplingParams(3), sender=Sender(b"bob"))
    engine.open.let(30)
    assert late.end.reason == "length"
    assert sum(bool(job.taken) for job, _ in asked) == 7
    engine.open.set()
    assert {listener.end.reason for _, listener in asked} == {"length"}


def test_texts_of_tenants_that_sit_out_are_those_of_plain_decoding(start, truths):
    service, _ = start()
    asked = [submit(service, *case, sender=Sender(bytes([65 + i % 3])))[1] for i, case in enumerate(CASES)]
    assert [listener.text for listener in asked] == [expected.text for expected in truths]


def test_a_full_queue_has_a_place_for_a_tenant_with_less_than_its_share(start):
    service, engine = start(batch=1, queue=3)
    engine.open.clear()
    asked = [submit(service, prompt_ids(6, i), sender=Sender(b"alice")) for i in range(4)]
    with pytest.raises(Overloaded):
        submit(service, prompt_ids(6, 4), sender=Sender(b"alice"))
    asked += [submit(service, prompt_ids(6, i), sender=Sender(b"bob")) for i in range(2)]
    for tenant in (b"alice", b"bob"):
        with pytest.raises(Overloaded):
            submit(service, prompt_ids(6, 4), sender=Sender(tenant))
    engine.open.set()
    assert {listener.end.reason for _, listener in asked} == {"length"}


def test_a_probe_takes_nobodys_place_in_the_queue_and_gets_its_token_or_fails(start):
    service, engine = start(batch=1, queue=1)
    engine.open.clear()
    _, probe = submit(service, [0], PROBE, priority=FIRST)
    reported = [submit(service, prompt_ids(6, i))[1] for i in range(2)]
    with pytest.raises(Overloaded):
        submit(service, prompt_ids(6, 2))
    engine.open.set()
    assert [listener.end.reason for listener in (probe, *reported)] == ["length"] * 3
    assert probe.end.completion_tokens == 1
    engine.fail = lambda call: True
    assert submit(service, [0], PROBE, priority=FIRST)[1].end.reason == "failed"


def test_priority_comes_before_arrival(start):
    service, engine = start(batch=1)
    engine.open.clear()
    submit(service, prompt_ids(6, 0))
    assert engine.entered.wait(SECONDS)
    order: list[int] = []
    reported = []
    for index, priority in enumerate((0, 5, -1, 0)):
        listener = Listener()
        reported.append(listener)

        def tell(event: Event, index: int = index, listener: Listener = listener) -> None:
            order.extend([index] if event.reason else [])
            listener(event)

        submit(service, prompt_ids(6, index), SamplingParams(2, ignore_eos=True), tell, priority=priority)
    engine.open.set()
    assert all(listener.end for listener in reported)
    assert order == [2, 0, 3, 1]


def test_deadlines_end_what_runs_and_what_waits(start):
    service, engine = start(batch=1)
    engine.open.clear()
    job, running = submit(service, prompt_ids(6, 0), seconds=600.0)
    engine.open.let(4)
    _, waiting = submit(service, prompt_ids(6, 1), seconds=0.05)
    _, patient = submit(service, prompt_ids(6, 2), seconds=600.0)
    threading.Event().wait(0.1)
    job.deadline = job.request.submitted  # it passes during the iteration that waits
    engine.open.set()
    assert running.end.reason == waiting.end.reason == "deadline"
    assert running.end.completion_tokens == len(running.token_ids) > 0
    assert waiting.end.first_token_seconds is None is waiting.end.queue_seconds
    assert patient.end.reason == "length"


def test_after_draining_nothing_is_taken(start):
    service, _ = start(batch=1)
    reported = [submit(service, prompt_ids(6, i))[1] for i in range(3)]
    assert service.drain(SECONDS)
    assert [listener.end.reason for listener in reported] == ["length"] * 3
    with pytest.raises(Overloaded, match="shutting down"):
        submit(service, [5])


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [1, 5, 9])
def test_an_engine_that_fails_once_costs_nobody_their_text(failing, start, truths):
    service, engine = start()
    engine.fail = lambda call: engine.passes == failing
    all_answered(service, truths)
    assert service.statistics().engine_failures == 1


def test_tokens_of_an_iteration_that_fails_at_its_end_are_told_once(start, truths):
    service, _ = start()
    step, steps = service.loop.step, []

    def failing():
        steps.append(step())
        if len(steps) in (4, 40):
            raise RuntimeError("after all was done")
        return steps[-1]

    service.loop.step = failing
    all_answered(service, truths)


def test_what_the_engine_fails_on_fails_alone(start, truths):
    service, engine = start()
    bad = 77
    engine.fail = lambda call: (call.token_ids == bad).sum() > 4
    reported = [submit(service, *case)[1] for case in CASES]
    _, listener = submit(service, [bad] * 9)
    assert listener.end.reason == "failed"
    assert "the engine is unwell" in listener.end.message
    assert [listener.text for listener in reported] == [expected.text for expected in truths]


def test_a_request_that_has_gone_on_since_is_not_guilty(start, offline):
    """Failures count in a row: one that was followed by a token is forgotten."""
    service, engine = start(batch=1)
    engine.fail = lambda call: engine.passes in (4, 9, 14, 19)
    prompt = prompt_ids(6, 0)
    _, listener = submit(service, prompt)
    assert listener.token_ids == offline.generate([prompt], LONG)[0].token_ids
    assert service.statistics().engine_failures == 4


def test_a_request_that_fails_beside_others_alone_is_given_up(start, truths):
    """The youngest that was there each time; those who ran beside it lose nothing."""
    service, engine = start()
    bad: list[Job] = []
    engine.fail = lambda call: len(call.past_lens) > 1 and any(job.request.slot >= 0 for job in bad)
    reported = [submit(service, *case)[1] for case in CASES]
    job, listener = submit(service, prompt_ids(9, 9), priority=-1)
    bad.append(job)
    assert listener.end.reason == "failed"
    assert "the engine is unwell" in listener.end.message
    assert [listener.text for listener in reported] == [expected.text for expected in truths]
    assert service.statistics().given_up == 1
    assert service.statistics().engine_failures <= 6


def test_nothing_is_found_in_the_pool_of_an_engine_that_failed(start, offline):
    service, engine = start()
    prompt, params = prompt_ids(100, 5), SamplingParams(30, ignore_eos=True)
    expected = offline.generate([prompt], params)[0].text
    assert submit(service, prompt, params)[1].text == expected

    def fail(call: ForwardBatch) -> bool:
        engine.fail = lambda call: False
        engine.engine._pool[:] = 3.0
        return True

    found = service.loop.counters.cached_tokens
    engine.fail = fail
    _, again = submit(service, prompt, params)
    assert (again.text, again.end.cached_tokens) == (expected, 96)
    assert service.loop.counters.cached_tokens == found + 96  # before it failed
    assert submit(service, prompt, params)[1].text == expected


def test_an_engine_that_always_fails_ends_every_request(start):
    service, engine = start()
    engine.fail = lambda call: True
    reported = [submit(service, prompt_ids(6, i))[1] for i in range(7)]
    assert [listener.end.reason for listener in reported] == ["failed"] * 7
    engine.fail = lambda call: False
    assert submit(service, prompt_ids(6, 1))[1].end.reason == "length"


def test_a_listener_that_fails_loses_its_own_request_alone(start):
    service, _ = start()

    def broken(event: Event) -> None:
        raise OSError("gone")

    submit(service, prompt_ids(6, 0), LONG, broken)
    _, other = submit(service, prompt_ids(6, 1))
    assert other.end.reason == "length"
    assert service.drain(SECONDS)
    assert service.statistics().ended == {"cancelled": 1, "length": 1}


def test_a_thread_that_dies_fails_every_request_and_is_known_to_be_dead(start, monkeypatch):
    """Recovering from an engine's failure fails here."""
    service, engine = start(batch=2)
    engine.open.clear()
    alive, reported = [], [Listener() for _ in range(3)]
    for seed, listener in enumerate(reported):

        def tell(event: Event, listener: Listener = listener) -> None:
            alive.append(service.alive) if event.reason else None
            listener(event)

        submit(service, prompt_ids(6, seed), LONG, tell)
    engine.open.let(4)
    monkeypatch.setattr(service.loop.batch.blocks, "forget_cached", lambda: 1 / 0)
    engine.fail = lambda call: True
    engine.open.set()
    assert {listener.end.reason for listener in reported} == {"failed"}
    assert all("the engine's thread has died" in listener.end.message for listener in reported)
    assert alive == [False] * 3
    assert service.drain(SECONDS)
    assert service.statistics().ended == {"failed": 3}
    with pytest.raises(Overloaded):
        submit(service, [5])
