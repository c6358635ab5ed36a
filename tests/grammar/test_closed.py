"""Objects that list their properties are closed, unless the schema says or needs otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from walks import allowed, assert_fits, compiler, ends, ids_of, rows, text_of, walk

from echo_trt.errors import UserError
from echo_trt.server.tool_formats.base import ToolRequest
from echo_trt.server.tool_formats.marked import HERMES, Marked

A, B = {"a": {"type": "integer"}}, {"b": {"type": "integer"}}
LISTED = {"type": "object", "properties": A, "required": ["a"]}
OTHER = {"type": "object", "properties": B, "required": ["b"]}
DEFINED = {"required": ["a"], "$defs": {"n": {"$id": "a number", "type": "integer"}}}
ONE, TWO = {"a": 1}, {"a": 1, "b": 2}


@pytest.fixture(scope="module")
def grammars():
    return compiler()


def takes(grammars, structured: dict[str, Any], text: str) -> bool:
    """Whether a grammar lets a text be written and end."""
    state = grammars.begin(structured)
    for token in ids_of(text):
        state = state.after(token)
        if state is None:
            return False
    return bool({*allowed(state).tolist()} & {*ends()})


@pytest.mark.parametrize(
    ("schema", "fits", "others"),
    [
        (LISTED, ONE, TWO),
        ({"properties": A}, ONE, TWO),
        ({"type": "object", "properties": {}}, {}, TWO),
        ({"type": "array", "items": LISTED}, [ONE], [TWO]),
        ({"type": "object", "properties": {"x": LISTED}}, {"x": ONE}, {"x": TWO}),
        ({"type": "object", "additionalProperties": LISTED}, {"k": ONE}, {"k": TWO}),
        ({"anyOf": [LISTED, {"type": "null"}]}, ONE, TWO),
        ({"allOf": [LISTED]}, ONE, TWO),
        ({"$defs": {"L": LISTED}, "$ref": "#/$defs/L", "description": "x"}, ONE, TWO),
        ({"type": "object", "properties": {"x": {"$ref": "#"}}}, {"x": {"x": {}}}, {"x": {"y": {}}}),
        ({"type": "object", "properties": {"properties": LISTED}}, {"properties": ONE}, {"properties": TWO}),
    ],
)
def test_an_object_that_lists_its_properties_has_no_others(grammars, schema, fits, others):
    requested = json.dumps(schema)
    assert takes(grammars, {"json": schema}, json.dumps(fits))
    assert not takes(grammars, {"json": schema}, json.dumps(others))
    assert json.dumps(schema) == requested, "the request's schema is as it was"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        LISTED | {"additionalProperties": True},
        LISTED | {"additionalProperties": {"type": "integer"}},
        LISTED | {"patternProperties": {"^b$": {"type": "integer"}}},
        {"type": "object", "properties": A, "required": ["a", "b"]},
        {"allOf": [LISTED, OTHER]},
        LISTED | {"allOf": [OTHER]},
        LISTED | {"anyOf": [OTHER, {"properties": {"c": {"type": "null"}}}]},
        {"allOf": [LISTED], "additionalProperties": {"type": "integer"}},
        {"$defs": {"L": LISTED}, "allOf": [{"$ref": "#/$defs/L"}, OTHER]},
        {"$defs": {"L": LISTED}, "$ref": "#/$defs/L", "properties": B},
        {"$defs": {"L": LISTED, "M": {"$ref": "#/$defs/L"}}, "allOf": [{"anyOf": [{"$ref": "#/$defs/M"}]}, OTHER]},
    ],
)
def test_an_object_that_may_have_others_stays_open(grammars, schema):
    assert takes(grammars, {"json": schema}, json.dumps(TWO))


def test_data_are_no_schemas(grammars):
    record = {"properties": {"a": 1}}
    for schema in ({"const": record}, {"enum": [record, 5]}):
        assert takes(grammars, {"json": schema}, json.dumps(record))


def test_arguments_of_calls_are_closed_too(grammars):
    grammar = Marked(HERMES).grammar(ToolRequest({"f": LISTED}, call_required=True, several=False))
    for arguments, fits in ((ONE, True), (TWO, False)):
        text = f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': arguments})}\n</tool_call>"
        assert takes(grammars, {"grammar": grammar}, text) is fits


@pytest.mark.parametrize("schema", [pytest.param(row["schema"], id=row["id"]) for row in rows("schemas.json")])
def test_every_open_schema_still_has_texts_that_fit_it(grammars, schema):
    """As clients write them: without a word of other properties."""
    schema = json.loads(json.dumps(schema).replace('"additionalProperties": false, ', "").replace(
        ', "additionalProperties": false', ""
    ))  # fmt: skip
    assert_fits(text_of(walk(grammars.begin({"json": schema}), 1, 10)), schema)


def test_identifiers_are_left_out_where_nothing_refers_to_them(grammars):
    names = {"$id": "Output Format", "$schema": "http://json-schema.org/draft-07/schema#", "$comment": "x"}
    inner = {"type": "object", "properties": {"$id": {"const": 1} | names}, "required": ["$id"]}
    for schema in (LISTED | names, names | {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}} | DEFINED):
        assert takes(grammars, {"json": schema}, json.dumps(ONE))
    assert takes(grammars, {"json": inner | names}, '{"$id": 1}')
    with pytest.raises(UserError, match="Output Format"):
        grammars.begin({"json": names | {"properties": {"a": {"$ref": "Output Format#/$defs/n"}}}})
