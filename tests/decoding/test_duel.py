"""A size against plain decoding in turns: what it really gains, on a machine that changes its speed meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from echo_trt.decoding.duel import HELD_TURN, PLAIN_TURN, Duel

MANY = 400  # requests, whose texts are easy and hard alike


def fought(duel: Duel, gain: float, speed: Callable[[float], float], progress: float = 2.0) -> tuple[bool, float]:
    """The verdict, and the seconds until then: plain iterations take a second at speed 1. ``gain``: the size's rate."""
    now = 0.0
    while True:
        while not duel.over():
            tokens, seconds = (progress, progress / gain) if duel.size else (1.0, 1.0)
            seconds /= speed(now)
            now += seconds
            duel.spent(seconds, tokens)
        verdict = duel.turned()
        if verdict is not None:
            return verdict, now


@pytest.mark.parametrize("gain", [0.5, 0.8, 0.95, 1.08, 1.2, 2.0])
def test_on_a_steady_machine_the_better_one_wins(gain):
    duel = Duel(16, MANY)
    pays, _ = fought(duel, gain, lambda now: 1.0)
    assert pays == (gain > 1)
    assert math.exp(duel.gain) == pytest.approx(gain)


def test_the_clearer_the_sooner():
    took = [fought(Duel(16, MANY), gain, lambda now: 1.0)[1] for gain in (1.05, 2.0)]
    assert took[1] < took[0] / 3


def test_turns_are_plain_first_and_last():
    duel, sizes = Duel(12, MANY), []
    while True:
        while not duel.over():
            sizes.append(duel.size)
            duel.spent(1.0, 1.05 if duel.size else 1.0)
        if duel.turned() is not None:
            break
    assert sizes[: PLAIN_TURN + HELD_TURN + PLAIN_TURN] == [0] * PLAIN_TURN + [12] * HELD_TURN + [0] * PLAIN_TURN
    assert sizes[-PLAIN_TURN:] == [0] * PLAIN_TURN


def test_the_first_iterations_of_a_turn_do_not_count():
    """The drafts catch up, which does not happen again while the size is held."""
    duel = Duel(16, MANY)
    while True:
        duel.spent(20.0, 1.0)
        while not duel.over():
            duel.spent(1.0, 1.5 if duel.size else 1.0)
        pays = duel.turned()
        if pays is not None:
            break
    assert pays
    assert math.exp(duel.gain) == pytest.approx(1.5)


@pytest.mark.parametrize("gain", [0.8, 1.25])
@pytest.mark.parametrize(("lasts", "right"), [(8.0, 0.8), (30.0, 0.9), (120.0, 0.9)])
def test_a_machine_that_changes_its_speed_favours_neither(gain, lasts, right):
    """Twice as fast and half as fast, for ``lasts`` plain iterations on average."""
    verdicts = []
    for seed in range(60):
        ends = np.cumsum(np.random.default_rng(seed).exponential(lasts, 400))
        verdicts.append(fought(Duel(16, MANY), gain, lambda now, ends=ends: 1 + np.searchsorted(ends, now) % 2)[0])
    assert np.mean(np.array(verdicts) == (gain > 1)) >= right


def test_iterations_with_prompts_make_a_turn_longer_up_to_a_bound():
    """They are not counted: they took the prompts' time."""
    asked = {}
    for every in (1, 2, 1000):
        duel, asked[every] = Duel(16, MANY), 0
        while not duel.over():
            if asked[every] % every == 0:
                duel.spent(1.0, 1.0)
            asked[every] += 1
    assert asked[1] == PLAIN_TURN
    assert asked[2] == 2 * PLAIN_TURN - 1
    assert asked[1000] == 4 * PLAIN_TURN


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_a_turn_of_prompts_alone_tells_nothing(progress):
    for known in (-0.2, 0.2):
        duel, turns = Duel(16, MANY, known, 3.0), 0
        while (verdict := duel.turned()) is None:
            turns += 1
            if progress and duel.size == 0:
                duel.spent(1.0, progress)
        assert verdict == (known > 0)
        assert duel.gain == known
        assert 6 <= turns <= 13


def test_what_earlier_duels_have_shown_outweighs_one_bad_turn():
    def first_turns(duel: Duel) -> bool | None:
        for size, seconds in ((0, 1.0), (16, 1.2), (0, 1.0)):
            assert duel.size == size
            while not duel.over():
                duel.spent(seconds, 1.0)
            verdict = duel.turned()
        return verdict

    assert first_turns(Duel(16, MANY)) is False
    assert first_turns(Duel(16, MANY, 0.3, 4.0)) is True


def test_a_turn_without_hope_is_cut_short():
    took = {gain: fought(Duel(16, MANY), gain, lambda now: 1.0, progress=1.0)[1] for gain in (0.5, 0.85)}
    assert took[0.5] == 2 * PLAIN_TURN + 5 / 0.5  # three that do not count, and two that show it
    assert took[0.85] == pytest.approx(2 * PLAIN_TURN + HELD_TURN / 0.85)


@pytest.mark.parametrize("gain", [0.85, 2.0])
def test_it_knows_what_it_has_cost(gain):
    duel = Duel(16, MANY)
    _, took = fought(duel, gain, lambda now: 1.0)
    lost, forgone = duel.losses()
    plain, held = PLAIN_TURN * 2, HELD_TURN * 2.0 / gain  # one turn of the size decides
    assert took == pytest.approx(plain + held)
    assert lost == pytest.approx(held - HELD_TURN * 2.0)
    assert forgone == pytest.approx(plain - plain / gain)


@pytest.mark.parametrize("requests", [1, 2, 8])
@pytest.mark.parametrize(("gain", "promised"), [(1.6, 1.6), (1.6, 1.2), (0.8, 1.0), (0.8, 1.2)])
def test_a_hard_piece_of_a_text_does_not_decide(requests, gain, promised):
    """A request's text is of one kind for some dozens of iterations: of one request alone a turn tells little."""
    verdicts, rng = [], np.random.default_rng(0)
    for _ in range(200):
        duel, verdict = Duel(16, requests, math.log(promised), 1.0), None
        while verdict is None:
            text = math.exp(rng.normal(0.0, 0.37 / math.sqrt(requests)))
            while not duel.over():
                duel.spent(1.0, gain * text if duel.size else 1.0)
            verdict = duel.turned()
        verdicts.append(verdict)
    assert np.mean(np.array(verdicts) == (gain > 1)) > 0.9
