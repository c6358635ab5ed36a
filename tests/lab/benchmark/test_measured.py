"""Rates and latencies of a peer, from the times at which its tokens arrived."""

from __future__ import annotations

import pytest

from echo_trt_lab.benchmark.peer import Arrivals, PeerRun, measured


def answer(prompt: int, sent: float, *times: float, tokens: float = 1) -> Arrivals:
    return Arrivals(prompt, sent, list(times), [tokens] * len(times))


def run(*arrivals: Arrivals, indices: int, answers: int | None = None) -> PeerRun:
    count = len(arrivals) if answers is None else answers
    end = max(a.times[-1] for a in arrivals[:count])
    return measured([""] * count, list(arrivals), indices, min(a.sent for a in arrivals), end)


def test_one_place_decodes_between_its_prompts():
    found = run(answer(10, 0, 2, 3, 4), answer(20, 4, 8, 9, 10), indices=1)
    assert (found.decode.tokens, found.decode.elapsed) == (4, 4)
    assert (found.prefill.tokens, found.prefill.elapsed) == (30, 6)
    assert (found.whole.tokens, found.whole.elapsed) == (6, 10)
    assert found.ttft == [2, 4]
    assert found.pace == [1, 1]
    assert found.accepted_length == 1


def test_a_step_that_computes_a_prompt_is_no_decoding_for_the_other_places():
    """The second prompt waits from 3 to 5, in which the first place gets a token at 5 instead of at 4."""
    found = run(answer(8, 0, 1, 2, 3, 5, 6, 7), answer(8, 0, 1, 2, 3), answer(8, 3, 5, 6, 7), indices=2)
    assert found.decode.tokens == 4 + 4
    assert found.decode.elapsed == pytest.approx(4)
    assert found.prefill.elapsed == 1 + 2
    assert found.prefill.tokens == 24
    assert found.pace == [pytest.approx(6 / 5), 1, 1]


def test_tokens_of_a_step_that_arrive_a_little_apart_belong_to_one_step():
    """As over HTTP: whichever of a step's events comes first, its gap is the step's."""
    early = run(answer(8, 0, 1.00, 2.00, 3.00, 5.00, 6.00, 7.00), answer(8, 3, 5.04, 6.04, 7.04), indices=2)
    late = run(answer(8, 0, 1.04, 2.04, 3.04, 5.04, 6.04, 7.04), answer(8, 3, 5.00, 6.00, 7.00), indices=2)
    for found in (early, late):
        assert found.decode.tokens == 6
        assert found.decode.elapsed == pytest.approx(3)
