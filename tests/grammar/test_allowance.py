"""What a text's grammar may cost, by a clock that passes with work alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from walks import compiler

from echo_trt.grammar import state as module
from echo_trt.grammar.state import AT_ONCE_S, PER_TOKEN_S, GrammarFailed, State

GRAMMARS = compiler()
OPERATIONS = 3  # on a token's way: what is forced, what is allowed, and the next state


class Clock:
    """A thread's CPU time: each piece of work takes ``seconds``."""

    def __init__(self, monkeypatch):
        self.seconds, self.now = 0.0, 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(thread_time=self))

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def write(state: State, tokens: int) -> State:
    """Write digits of a number without end, as a loop does."""
    for _ in range(tokens):
        state.forced(16)
        assert state.mask is not None
        state = state.after(DIGIT)
    return state


def begun() -> State:
    return GRAMMARS.begin({"regex": "[0-9]*"})


def test_a_text_goes_on_as_long_as_its_tokens_pay(clock):
    state = begun()
    clock.seconds = PER_TOKEN_S / OPERATIONS
    assert write(state, 1000).position == 1000


def test_a_text_ends_once_it_has_cost_more(clock):
    state, clock.seconds = begun(), 0.0
    clock.seconds = 2 * PER_TOKEN_S / OPERATIONS
    affordable = round(AT_ONCE_S / PER_TOKEN_S)
    state = write(state, affordable - 1)
    with pytest.raises(GrammarFailed, match="costs too much"):
        write(state, 3)


def test_cheap_tokens_save_up_no_more_than_is_allowed_at_once(clock):
    state = write(begun(), 1000)
    clock.seconds = AT_ONCE_S
    state.forced(16)
    assert state.mask is not None
    with pytest.raises(GrammarFailed, match="costs too much"):
        state.after(DIGIT)


def draft(state: State, first: int) -> None:
    """Look at a draft of nine tokens behind ``state``."""
    leaf = state.after(first)
    for _ in range(8):
        leaf = leaf.after(DIGIT)


def test_rejected_drafts_cost_time_and_earn_it_once(clock):
    state = begun()
    clock.seconds = PER_TOKEN_S
    for first in DIGITS[:2]:
        draft(state, first)
    with pytest.raises(GrammarFailed, match="costs too much"):
        draft(state, DIGITS[2])


DIGITS = [GRAMMARS.begin({"choice": [digit]}).tokens.spell(digit)[0] for digit in "0123456789"]
DIGIT = DIGITS[7]
