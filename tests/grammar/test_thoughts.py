"""Thoughts: free text before an answer that a grammar constrains."""

from __future__ import annotations

import numpy as np
import pytest
from walks import CLOSES, OPENS, allowed, assert_fits, compiler, ends, ids_of, text_of, tokenizer, walk

from echo_trt.grammar.state import ReasoningState

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
ASKED = {"json": SCHEMA}
FREE = ids_of("hm, so")


@pytest.fixture(scope="module")
def grammars():
    return compiler()


@pytest.fixture(scope="module")
def marks() -> tuple[int, int]:
    return tokenizer().token_to_id(OPENS), tokenizer().token_to_id(CLOSES)


def after(state, tokens):
    for token in tokens:
        state = state.after(token)
        assert state is not None, token
    return state


def test_a_thought_is_free(grammars, marks):
    state = grammars.begin(ASKED, ReasoningState(*marks, inside=True))
    everything = set(range(tokenizer().get_vocab_size()))
    for token in [*FREE, *ids_of('}{"x":'), marks[0]]:
        assert set(allowed(state).tolist()) == everything - set(ends())
        assert state.forced(4) == []
        state = after(state, [token])


def test_the_grammar_holds_behind_a_thought(grammars, marks):
    plain = grammars.begin(ASKED)
    state = after(grammars.begin(ASKED, ReasoningState(*marks, inside=True)), [*FREE, marks[1]])
    assert np.array_equal(state.mask, plain.mask)
    assert state.forced(8) == plain.forced(8)
    assert_fits(text_of(walk(state, 3)), SCHEMA)
    assert state.after(marks[0]) is None


def test_a_thought_may_open(grammars, marks):
    plain = grammars.begin(ASKED)
    state = grammars.begin(ASKED, ReasoningState(*marks, inside=False))
    assert set(allowed(state)) == {*allowed(plain), marks[0]}
    opened = after(state, [marks[0], *FREE, marks[1]])
    assert np.array_equal(opened.mask, plain.mask)


def test_a_spent_budget_closes_at_once(grammars, marks):
    state = grammars.begin(ASKED, ReasoningState(*marks, inside=True, left=0))
    assert allowed(state).tolist() == [marks[1]]
    assert state.forced(5) == [marks[1]]
    assert state.after(FREE[0]) is None
    assert_fits(text_of(walk(after(state, [marks[1]]), 1)), SCHEMA)


@pytest.mark.parametrize("structured", [ASKED, None])
@pytest.mark.parametrize("opened", [True, False])
def test_a_budget_is_counted(grammars, marks, structured, opened):
    """The marks do not count."""
    state = grammars.begin(structured, ReasoningState(*marks, inside=opened, left=3))
    state = state if opened else after(state, [marks[0]])
    for token in FREE[:3]:
        assert marks[1] in allowed(state)
        assert len(allowed(state)) > 900
        state = after(state, [token])
    assert allowed(state).tolist() == [marks[1]]
    assert after(state, [marks[1]]).after(marks[1] if structured is None else ids_of("{")[0]) is not None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", False),
        (f"hello{OPENS}", True),
        (f"hello{OPENS}\n", True),
        (f"hello{OPENS}let me see, what a message may say", False),
        (f"hello{OPENS}{CLOSES}", None),
        (f"hello{OPENS}\n\n{CLOSES}\n\n", None),
        (f"{OPENS}old{CLOSES}an answer, and then another question", False),
        (f"{OPENS}old{CLOSES}an answer, and then another question{OPENS}", True),
    ],
)
def test_what_a_prompt_leaves_open(marks, prompt, expected):
    """Inside a thought, before one that may open, or behind a closed one."""
    reasoning = ReasoningState.following(ids_of(prompt), *marks, 7)
    assert (reasoning and reasoning.inside) is expected
    assert reasoning is None or reasoning.left == 7
