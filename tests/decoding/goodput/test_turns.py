"""A size and plain decoding in turns: what the size really gains, on a machine that changes its speed meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from echo_trt.decoding.goodput.turns import HELD_TURN, PLAIN_TURN, Turns

MANY = 400  # requests, whose texts are easy and hard alike
STEADY = 1.0


class Machine:
    """Plain iterations take 10 ms at ``speed`` 1; the size has ``gain`` times their rate, with ``progress`` tokens."""

    def __init__(self, gain: float, speed: Callable[[float], float] = lambda now: STEADY, progress: float = 2.0):
        self.gain, self.speed, self.progress = gain, speed, progress
        self.now = self.tokens = 0.0
        self.turns: list[bool] = []

    def run(self, turns: Turns, seconds: float, first: float = 0.0) -> Machine:
        """``first``: seconds that an iteration of another size takes more."""
        end, new = self.now + seconds, first
        while self.now < end:
            if turns.tick():
                before = turns.speculates
                turns.next()
                new = first * (turns.speculates != before)
            self.turns.append(turns.speculates)
            tokens, taken = (self.progress, 0.01 * self.progress / self.gain) if turns.speculates else (1.0, 0.01)
            taken = taken / self.speed(self.now) + new
            new = 0.0
            self.now, self.tokens = self.now + taken, self.tokens + tokens
            turns.spent(taken, tokens)
        return self

    @property
    def ratio(self) -> float:
        """To plain decoding's rate at speed 1."""
        return 0.01 * self.tokens / self.now


@pytest.mark.parametrize("gain", [0.5, 0.8, 0.9, 1.1, 1.2, 2.0])
@pytest.mark.parametrize("foreseen", [0.8, 1.3])
def test_on_a_steady_machine_the_better_one_runs(gain, foreseen):
    turns = Turns(MANY, math.log(foreseen))
    Machine(gain).run(turns, 25.0)  # what is foreseen to lose is not tried at once
    machine = Machine(gain).run(turns, 60.0)
    assert (turns.gain > 0) == (gain > 1)
    assert np.mean(np.array(machine.turns[-1000:]) == (gain > 1)) > 0.8
    assert machine.ratio > 0.98 * max(gain, 1.0)


@pytest.mark.parametrize("gain", [0.9, 1.1, 1.3])
def test_the_gain_is_known(gain):
    turns = Turns(MANY, 0.1)
    Machine(gain).run(turns, 60.0)
    assert math.exp(turns.gain) == pytest.approx(gain, rel=0.02)


def test_plain_decoding_begins_and_then_what_is_foreseen_to_be_better():
    for foreseen, then in ((1.3, [True] * HELD_TURN), (0.5, [False] * PLAIN_TURN)):
        machine = Machine(1.0).run(Turns(MANY, math.log(foreseen)), 1.0)
        assert machine.turns[: PLAIN_TURN + len(then)] == [False] * PLAIN_TURN + then


@pytest.mark.parametrize(("foreseen", "waits"), [(0.98, (0.0, 0.1)), (0.93, (2.0, 5.0)), (0.8, (7.5, 30.0))])
def test_the_less_a_size_is_foreseen_to_lose_the_sooner_it_is_tried(foreseen, waits):
    turns, machine = Turns(MANY, math.log(foreseen)), Machine(1.15)
    while not turns.speculates:
        machine.run(turns, 0.01)
    assert waits[0] <= machine.now <= waits[1]


def test_while_it_is_not_clear_which_is_better_they_alternate():
    turns = Turns(MANY, 0.01)
    machine = Machine(1.15, progress=1.0).run(turns, 0.25)
    assert (
        machine.turns[: 2 * PLAIN_TURN + HELD_TURN] == [False] * PLAIN_TURN + [True] * HELD_TURN + [False] * PLAIN_TURN
    )
    later = Machine(1.15, progress=1.0).run(turns, 30.0)
    assert np.mean(later.turns) > 0.85


def test_the_first_iterations_of_a_turn_do_not_count():
    """The drafts catch up, which does not happen again while the size is held."""
    turns = Turns(MANY, math.log(1.5))
    Machine(1.5).run(turns, 60.0, first=0.05)
    assert math.exp(turns.gain) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("gain", [0.8, 1.25])
@pytest.mark.parametrize("lasts", [0.08, 0.3, 1.2])
def test_a_machine_that_changes_its_speed_favours_neither(gain, lasts):
    """Twice as fast and half as fast, for ``lasts`` seconds on average."""
    right = []
    for seed in range(20):
        ends = np.cumsum(np.random.default_rng(seed).exponential(lasts, 4000))
        machine = Machine(gain, lambda now, ends=ends: 1 + np.searchsorted(ends, now) % 2)
        turns = Turns(8, 0.0)
        machine.run(turns, 20.0)
        right.append(np.mean(np.array(machine.turns[len(machine.turns) // 2 :]) == (gain > 1)))
    assert np.mean(right) > 0.85


@pytest.mark.parametrize("gain", [0.7, 0.9])
def test_what_looking_costs_is_a_hundredth_of_the_time(gain):
    turns = Turns(MANY, math.log(gain))
    machine = Machine(gain).run(turns, 5.0, first=0.03)
    begin, tokens = machine.now, machine.tokens
    machine.run(turns, 200.0, first=0.03)
    assert 0.01 * (machine.tokens - tokens) / (machine.now - begin) > 0.985
    assert sum(machine.turns[-4000:]) > 0


def test_what_was_lost_once_is_not_paid_for_ever():
    turns = Turns(MANY, -0.3)
    Machine(0.7).run(turns, 3.0, first=30.0)
    assert any(Machine(0.7).run(turns, 31.0).turns)


def test_a_draft_that_becomes_good_is_found():
    turns = Turns(MANY, 0.0)
    Machine(0.7).run(turns, 60.0)
    assert np.mean(Machine(1.3).run(turns, 20.0).turns) > 0.6


def test_iterations_with_prompts_make_a_turn_longer_up_to_a_bound():
    """They are not counted: they took the prompts' time."""
    asked = {}
    for every in (1, 2, 1000):
        turns, asked[every] = Turns(MANY, 0.0), 0
        while not turns.tick():
            if asked[every] % every == 0:
                turns.spent(1.0, 1.0)
            asked[every] += 1
    assert asked[1] == PLAIN_TURN
    assert asked[2] == 2 * PLAIN_TURN - 1
    assert asked[1000] == 4 * PLAIN_TURN


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_a_turn_of_prompts_alone_tells_nothing(progress):
    turns = Turns(MANY, 0.2)
    for _ in range(40):
        if progress and not turns.speculates:
            turns.spent(1.0, progress)
        turns.next()
    assert turns.gain == 0.2


def test_while_prompts_leave_nothing_to_compare_the_better_one_runs():
    for gain in (-0.3, 0.3):
        turns, ran = Turns(MANY, gain), []
        for _ in range(4000):
            if turns.tick():
                turns.next()
            ran.append(turns.speculates)
        assert np.mean(np.array(ran) == (gain > 0)) > 0.95


@pytest.mark.parametrize("gain", [0.85, 1.5])
def test_visits_too_short_to_compare_are_not_spent_on_the_worse_one(gain):
    """Two loads that come in turn, for 0.2 seconds each."""
    loads = [Turns(8, math.log(gain)), Turns(8, math.log(gain))]
    machine = Machine(gain, progress=1.0)
    for visit in range(200):
        loads[visit % 2].resume(away=20)
        machine.run(loads[visit % 2], 0.2)
    assert np.mean(np.array(machine.turns) == (gain > 1)) > 0.9


@pytest.mark.parametrize("lasts", [12, 20, 40])
@pytest.mark.parametrize("gain", [0.7, 1.4])
def test_what_is_foreseen_wrong_is_set_right_in_short_visits(gain, lasts):
    """No turn is whole between two visits of another load."""
    turns, machine = Turns(8, -math.log(gain)), Machine(gain)
    for _ in range(6000 // lasts):
        turns.resume(away=lasts)
        machine.run(turns, 0.01 * lasts)
    assert np.mean(np.array(machine.turns[-800:]) == (gain > 1)) > 0.85


@pytest.mark.parametrize("gain", [0.95, 1.0, 1.05])
@pytest.mark.parametrize("each", [1.0, 30.0])
def test_what_gains_next_to_nothing_is_not_looked_at_for_ever(gain, each):
    """``each``: times as long, every iteration, as others here."""
    turns = Turns(8, 0.0)
    slow = Machine(gain, lambda now: 1 / each)
    slow.run(turns, 100.0 * each, first=0.003 * each)
    begin, tokens = slow.now, slow.tokens
    slow.run(turns, 400.0 * each, first=0.003 * each)
    assert 0.01 * each * (slow.tokens - tokens) / (slow.now - begin) > 0.98 * max(gain, 1.0)


def test_a_turn_without_hope_is_cut_short():
    turns = Turns(MANY, 0.2)
    machine = Machine(0.5, progress=1.0).run(turns, 1.0)
    first = machine.turns[PLAIN_TURN:]
    assert first.index(False) == 5  # three that do not count, and two that show it


@pytest.mark.parametrize("requests", [1, 2, 8])
@pytest.mark.parametrize(("gain", "foreseen"), [(1.6, 1.6), (1.6, 1.2), (0.8, 1.0), (0.8, 1.2)])
def test_a_hard_piece_of_a_text_does_not_decide(requests, gain, foreseen):
    """A request's text is of one kind for some dozens of iterations: of one request alone a turn tells little."""
    right, rng = [], np.random.default_rng(0)
    for _ in range(40):
        turns, ran = Turns(requests, math.log(foreseen)), []
        for _ in range(40):
            text = math.exp(rng.normal(0.0, 0.37 / math.sqrt(requests)))
            while not turns.tick():
                turns.spent(0.01, gain * text if turns.speculates else 1.0)
                ran.append(turns.speculates)
            turns.next()
        right.append(np.mean(np.array(ran[len(ran) // 2 :]) == (gain > 1)))
    assert np.mean(right) > 0.7


def test_what_one_size_gains_says_less_of_quite_another_one():
    turns = Turns(8, 0.1)
    turns.hold(16)
    before = turns.variance
    turns.hold(20)
    assert turns.variance == before
    turns.hold(40)
    assert turns.variance > before


def test_a_load_like_a_known_one_begins_with_what_is_known():
    turns = Turns(8, 0.0)
    Machine(1.4).run(turns, 20.0)
    like = turns.carried_to(6)
    assert like.speculates
    assert like.gain == turns.gain
    assert like.variance > turns.variance


def test_the_pass_that_changes_to_another_size_does_not_count():
    turns = Turns(MANY, 0.3)
    turns.hold(16)
    Machine(1.35).run(turns, 3.0)
    while not turns.speculates or turns._skipped > 0:
        Machine(1.35).run(turns, 0.01)
    counted = turns._sums[1].copy()
    turns.hold(20)
    turns.spent(9.0, 1.0)
    assert (turns._sums[1] == counted).all()


def test_what_ran_long_ago_is_compared_with_nothing():
    turns = Turns(MANY, 0.3)
    Machine(1.35).run(turns, 1.0)
    known = turns.gain
    for _ in range(3):  # each time at another speed
        turns.resume(away=1000)
        while not turns.tick():
            turns.spent(0.01, 5.0 if turns.speculates else 1.0)
    turns.next()
    assert turns.gain == known
