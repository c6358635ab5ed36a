"""Grammars that no text can fit, or that cannot be kept to, are refused by one sentence; compiled ones are kept."""

from __future__ import annotations

import json

import pytest
from refusal import refused
from walks import compiler, ends, rows, tokenizer

from echo_trt.grammar.compiler import CACHED, GrammarCompiler
from echo_trt.grammar.requested import LONGEST
from echo_trt.grammar.state import Vocabulary

REFUSED = [pytest.param(row["schema"], row["word"], id=row["id"]) for row in rows("refused.json")]
TOO_MANY = {"type": "object", "properties": {f"k{i}": {"type": "null"} for i in range(4000)}}
LARGE = {"enum": [f"{i}{'x' * 100}" for i in range(2000)]}  # 200 KB
RECORD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Counting(GrammarCompiler):
    """Counts what it compiles."""

    compiled = 0

    def _compile(self, kind, value):
        self.compiled += 1
        return super()._compile(kind, value)


@pytest.fixture(scope="module")
def grammars():
    return compiler()


@pytest.fixture
def counting() -> Counting:
    return Counting(tokenizer().to_str(), Vocabulary(tokenizer().get_vocab_size(), ends()))


@pytest.mark.parametrize(("schema", "word"), REFUSED)
def test_schemas_are_refused_by_one_sentence(grammars, schema, word):
    with refused("structured.json", word):
        grammars.begin({"json": schema})


def test_large_schemas_are_refused(grammars):
    with refused("structured.json", "too big"):
        grammars.begin({"json": TOO_MANY})
    with refused("structured.json", LONGEST):
        grammars.begin({"json": LARGE})


@pytest.mark.parametrize(
    ("structured", "words"),
    [
        ({}, ["structured", '{"json": SCHEMA}']),
        ({"json": {}, "regex": "a"}, ["json", "regex"]),
        ({"schema": {}}, ["schema", '{"json": SCHEMA}']),
        ({"json": "{}"}, ["structured.json", "'{}'"]),
        ({"json": [1]}, ["structured.json", "[1]"]),
        ({"json": {"enum": {1}}}, ["structured.json", "not JSON"]),
        ({"json_object": False}, ["structured.json_object", "False"]),
        ({"regex": ""}, ["structured.regex", "''"]),
        ({"regex": 3}, ["structured.regex", "3"]),
        ({"regex": "(a"}, ["structured.regex", "unclosed"]),
        ({"regex": "(?=a)b"}, ["structured.regex", "look-ahead"]),
        ({"regex": "(a)\\1"}, ["structured.regex", "backreferences"]),
        ({"regex": "[^\\s\\S]"}, ["structured.regex", "no text fits it"]),
        ({"choice": []}, ["structured.choice", "[]"]),
        ({"choice": ["a", ""]}, ["structured.choice"]),
        ({"choice": "abc"}, ["structured.choice", "'abc'"]),
        ({"grammar": "start: missing"}, ["structured.grammar", "missing"]),
        ({"grammar": 'root ::= "a'}, ["structured.grammar"]),
        ({"grammar": 'root ::= root "a"'}, ["structured.grammar", "no text fits it"]),
        ({"grammar": 'start: %json {"uniqueItems": true}'}, ["structured.grammar", "uniqueItems"]),
        ("json", ["structured"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_mistakes_are_refused_by_one_sentence(grammars, structured, words):
    with refused(*words):
        grammars.begin(structured)


AGAIN = {"$ref": "#/$defs/a"}


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        ({"type": "array", "items": AGAIN}, True),
        ({"type": "array", "minItems": 1, "items": AGAIN}, False),
        ({"type": "array", "minItems": 1, "prefixItems": [{"type": "null"}], "items": AGAIN}, True),
        ({"type": "array", "minItems": 2, "prefixItems": [{"type": "null"}], "items": AGAIN}, False),
        ({"type": "array", "minItems": 1, "prefixItems": [{"type": "null"}, AGAIN]}, True),
        ({"type": "object", "properties": {"x": AGAIN}, "required": []}, True),
        ({"type": "object", "properties": {"x": AGAIN}, "required": ["x"]}, False),
        ({"type": "object", "properties": {"x": {"anyOf": [AGAIN, {"type": "null"}]}}, "required": ["x"]}, True),
        ({"type": "object", "properties": {"x": {"anyOf": [AGAIN, AGAIN]}}, "required": ["x"]}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["a", "a~1b", "a~0b"])
def test_schemas_that_hold_themselves_are_taken_where_a_text_ends(grammars, schema, ends, name):
    """Under any name: a reference writes / and ~ as ~1 and ~0."""
    text = json.dumps({"$defs": {"a": schema}, **AGAIN}).replace("#/$defs/a", f"#/$defs/{name}")
    requested = json.loads(text.replace('"a":', f'"{name.replace("~1", "/").replace("~0", "~")}":'))
    if ends:
        assert grammars.begin({"json": requested})
        return
    with refused("structured.json", "never ends"):
        grammars.begin({"json": requested})


@pytest.mark.parametrize(
    "structured",
    [
        {"json": {"const": "\ud800"}},
        {"choice": ["\ud800"]},
        {"regex": "\ud800"},
        {"json": {"type": "integer", "minimum": 10**20}},
    ],
    ids=["surrogate", "surrogate in a choice", "surrogate in a regex", "large number"],
)
def test_values_that_cannot_be_passed_on_are_refused(grammars, structured):
    with refused("structured"):
        grammars.begin(structured)


@pytest.mark.parametrize(
    "schema",
    [{"const": float("nan")}, {"x-guidance": {"lenient": True}, "not": {"type": "object"}}],
    ids=["not a number", "leniency"],
)
def test_schemas_that_would_not_be_kept_to_are_refused(grammars, schema):
    with refused("structured.json"):
        grammars.begin({"json": schema})


def test_a_grammar_is_compiled_once(counting):
    for _ in range(3):
        counting.begin({"json": RECORD})
        counting.begin({"regex": "a+"})
    assert counting.compiled == 2


def test_an_unexpected_failure_is_not_kept():
    class Short(Counting):
        def _compile(self, kind, value):
            if not self.compiled:
                self.compiled += 1
                raise MemoryError("no memory")
            return super()._compile(kind, value)

    grammars = Short(tokenizer().to_str(), Vocabulary(tokenizer().get_vocab_size(), ends()))
    with refused("structured.json", "no memory"):
        grammars.begin({"json": RECORD})
    grammars.begin({"json": RECORD})
    assert grammars.compiled == 2


def test_the_latest_grammars_are_kept(counting):
    counting.begin({"json": RECORD})
    for i in range(CACHED):
        counting.begin({"choice": [f"text {i}"]})
    assert counting.compiled == CACHED + 1
    counting.begin({"choice": ["text 0"]})
    assert counting.compiled == CACHED + 1
    counting.begin({"json": RECORD})
    assert counting.compiled == CACHED + 2
