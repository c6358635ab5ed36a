"""What JSON forces is drafted in the layout that the text has had so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from walks import assert_fits, compiler, ends, ids_of, spelled

from echo_trt.grammar.state import State

DRAFTED = 16  # tokens that are asked for at a place
POINT = {"type": "array", "prefixItems": [{"type": "integer"}] * 2, "items": False, "minItems": 2}
SONG = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "length": {"type": "integer", "minimum": 0},
        "explicit": {"type": "boolean"},
        "genres": {"type": "array", "items": {"enum": ["rock", "jazz", "folk"]}, "maxItems": 3},
        "artist": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "born": {"type": "integer"}},
            "required": ["name", "born"],
            "additionalProperties": False,
        },
        "position": POINT,
    },
    "required": ["title", "length", "explicit", "genres", "artist", "position"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"list": {"type": "string"}, "songs": {"type": "array", "items": SONG}},
    "required": ["list", "songs"],
    "additionalProperties": False,
}
ASKED = {"json": SCHEMA}


def song(title: str, length: int, genres: list[str], name: str, position: list[int]) -> dict[str, Any]:
    artist = {"name": name, "born": 1900 + length % 100}
    known = {"title": title, "length": length, "explicit": length % 2 == 0, "genres": genres}
    return known | {"artist": artist, "position": position}


RECORD = {
    "list": 'On the road: a {mixed} [bag], "as such"',
    "songs": [
        song("Long, long way", 247, ["rock", "folk"], "Ann Lee", [3, 14]),
        song("Blue: a study", 311, ["jazz"], "Öykü Ö.", [15, 92]),
        song("{empty}", 188, ["folk", "jazz", "rock"], "The [Brackets]", [65, 35]),
        song("Final call", 202, ["rock"], "Mo", [8, 97]),
    ],
}


LAYOUTS: dict[str, Callable[[Any], str]] = {
    "compact": partial(json.dumps, ensure_ascii=False, separators=(",", ":")),
    "spaces": partial(json.dumps, ensure_ascii=False),
    "space behind colons": partial(json.dumps, ensure_ascii=False, separators=(",", ": ")),
    "indent 1": partial(json.dumps, ensure_ascii=False, indent=1),
    "indent 2": partial(json.dumps, ensure_ascii=False, indent=2),
    "indent 4": partial(json.dumps, ensure_ascii=False, indent=4),
    "indent 2, tight colons": partial(json.dumps, ensure_ascii=False, indent=2, separators=(",", ":")),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def grammars():
    """Make new grammars for each test: a compiler remembers how the latest answer was laid out."""
    return compiler()


def drafts(state: State, text: str) -> tuple[list[tuple[int, bytes]], float]:
    """Return what is forced at each place of a text, as its place in bytes and its bytes; and the share of tokens
    drafted.

    A draft counts up to its first token that is not the text's, as in speculative decoding.
    """
    tokens, found, index, taken, free_until = [*ids_of(text), ends()[0]], [], 0, 0, 0
    for number, token in enumerate(tokens):
        if number >= free_until:
            forced = state.forced(DRAFTED)
            found.append((index, b"".join(spelled()[each] for each in forced)))
            same = [a == b for a, b in zip(forced, tokens[number:], strict=False)]
            right = same.index(False) if False in same else len(same)
            taken, free_until = taken + right, number + right
        state = state.after(token)
        assert state is not None, text[:index]
        index += len(spelled()[token])
    assert state.ended
    return found, taken / len(tokens)


@EVERY
def test_what_is_forced_is_laid_out_as_the_text_was(grammars, layout):
    """From the second song on, no separator is new."""
    text = LAYOUTS[layout](RECORD)
    whole, known = text.encode(), text.encode().index(b"Blue")
    found, _ = drafts(grammars.begin(ASKED), text)
    wrong = [(whole[index - 20 : index], draft) for index, draft in found if not agrees(whole, index, draft)]
    late = [(index, draft) for index, draft in found if index >= known and not agrees(whole, index, draft)]
    assert not late, late[:3]
    assert len(wrong) <= 8, wrong  # what may be new: a colon, a comma, and the lines of two kinds of containers
    assert sum(bool(draft) for _, draft in found) > 40


def agrees(whole: bytes, index: int, draft: bytes) -> bool:
    return whole[index:].startswith(draft)


def test_a_text_may_change_its_layout(grammars):
    """What is drafted follows the latest lines; nothing is forbidden."""
    first, second = LAYOUTS["indent 2"](RECORD["songs"][:2]), LAYOUTS["compact"](RECORD["songs"][2:])
    text = '{"list": "x", "songs": ' + first.rstrip("\n]") + ",\n" + second[1:] + "}"
    assert_fits(text, SCHEMA)
    found, _ = drafts(grammars.begin(ASKED), text)
    last = text.encode().index(b"Final")
    assert all(agrees(text.encode(), index, draft) for index, draft in found if index > last)


def test_layouts_do_not_change_what_is_allowed(grammars):
    """States of one text have the same masks, whatever was written before."""
    before = grammars.begin(ASKED).mask
    for layout in LAYOUTS.values():
        drafts(grammars.begin(ASKED), layout(RECORD))
        assert (grammars.begin(ASKED).mask == before).all()
