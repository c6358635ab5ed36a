"""Texts under 200 JSON schemas: drawn at random, they all fit, and forbidden tokens are those that lead nowhere."""

from __future__ import annotations

import numpy as np
import pytest
from walks import LONGEST, allowed, assert_fits, choose, compiler, ends, rows, spelled, text_of, tokenizer, walk

from echo_trt.grammar.state import State

SCHEMAS = {row["id"]: row["schema"] for row in rows("schemas.json")}
FREE = (0, 12, 60)  # tokens that a walk draws before it makes for the end
EVERY = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
SOME = pytest.mark.parametrize("schema", [*SCHEMAS.values()][::5], ids=[*SCHEMAS][::5])


@pytest.fixture(scope="module")
def grammars():
    return compiler()


def indices(state: State, seed: int, number: int) -> list[State]:
    """States of a random text, from its beginning on, at most ``number`` of them, spread over it."""
    draw, found = np.random.default_rng(seed), []
    while not state.ended and len(found) < LONGEST:
        found.append(state)
        following = state.after(choose(state, draw, len(found) >= 40))
        assert following is not None
        state = following
    return found[:: -(-len(found) // number)]


@EVERY
def test_random_texts_fit(grammars, schema):
    for seed, free in enumerate(FREE):
        assert_fits(text_of(walk(grammars.begin({"json": schema}), seed, free)), schema)


@EVERY
def test_forbidden_tokens_lead_nowhere(grammars, schema):
    """Where a text is forced, the mask has the token that a tokenizer writes; others may spell the same."""
    size = tokenizer().get_vocab_size()
    draw = np.random.default_rng(1)
    for state in indices(grammars.begin({"json": schema}), 7, 5):
        options = allowed(state)
        for token in {*draw.integers(0, size, 12).tolist(), *draw.choice(options, 4).tolist(), *ends()}:
            if token in options or len(options) > 1 or state.after(token) is None:
                assert (state.after(token) is None) == (token not in options), token
            else:
                two = sorted((spelled()[token], spelled()[options[0]]), key=len)
                assert two[1].startswith(two[0]), token


@SOME
def test_masks_are_those_of_the_text(grammars, schema):
    """It does not matter what was asked of the states before."""
    requested, unasked = grammars.begin({"json": schema}), grammars.begin({"json": schema})
    for token in walk(grammars.begin({"json": schema}), 3, 10)[:40]:
        requested.forced(12)
        assert np.array_equal(requested.mask, unasked.mask)
        requested, unasked = requested.after(token), unasked.after(token)


@SOME
def test_forced_tokens_are_allowed(grammars, schema):
    for state in indices(grammars.begin({"json": schema}), 5, 6):
        forced = state.forced(12)
        assert len(forced) <= 12
        assert state.forced(3) == forced[:3]
        for token in forced:
            assert token in allowed(state)
            following = state.after(token)
            assert following is not None
            state = following


def test_json_object_is_any_object(grammars):
    for seed in range(20):
        assert_fits(text_of(walk(grammars.begin({"json_object": True}), seed, 30)), {"type": "object"})
