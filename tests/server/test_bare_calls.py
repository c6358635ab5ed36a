"""Calls without their format's marks: which texts are calls, how long text is held back, and what a limit cuts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.engine.text.prompts import ThinkTokens
from echo_trt.server.chats import chat_for
from echo_trt.server.schemas import ChatRequest
from echo_trt.server.text_client import ModelFacts, TextPiece
from echo_trt.server.tool_formats.bare import BareParser
from echo_trt.server.tool_formats.base import Arguments, Call, Content
from echo_trt.server.tool_formats.llama3 import Llama3Parser
from echo_trt.server.tool_formats.marked import MarkedParser
from echo_trt.server.turns import OutputParser

NAMES = {"get_weather": {}, "add": {}, "add_all": {}}
ADD = '{"name": "add", "arguments": {"a": 1}}'
ONE, TWO = ("add", '{"a": 1}'), ("get_weather", "{}")
OTHER = '{"name": "Bob", "arguments": {"a": 1}}'


def read(pieces: list[str], cut: bool = False, several: bool = True, marked: type = MarkedParser):
    parser = BareParser(marked(NAMES, several), NAMES, several)
    content, calls = "", []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.finish(cut):
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, Call):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


def divided(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]


CALLS = [
    (ADD, "", [ONE]),
    (f"\n {ADD}\n", "", [ONE]),
    (f"```json\n{ADD}\n```", "", [ONE]),
    (f"```\n{ADD}\n```\n", "", [ONE]),
    (f"```json\n{ADD}", "", [ONE]),
    (f"```json\n{ADD}\n``", "", [ONE]),
    (f"I add.\n\n```json\n{ADD}\n```", "I add.", [ONE]),
    (f"I add: {ADD}", "I add:", [ONE]),
    *((f"So:\n<{tag}>\n{ADD}\n</{tag}>", "So:", [ONE]) for tag in ("tools", "function_call", "response", "json")),
    ('{"name":"add","parameters":{"a": 1}}', "", [ONE]),
    ('{\n  "arguments": {"a": 1},\n  "name": "add"\n}', "", [ONE]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [ONE]),
    ('{"name": "get_weather", "arguments": {}}', "", [TWO]),
    (f'{ADD}\n{{"name": "get_weather", "arguments": {{}}}}', "", [ONE, TWO]),
    (f"```json\n{ADD}\n```\n```json\n{ADD}\n```", "", [ONE, ONE]),
    (f"{ADD}\n<tool_call>\n{ADD}\n</tool_call>", "", [ONE, ONE]),
    (f"```json\n{OTHER}\n```\n```json\n{ADD}\n```", f"```json\n{OTHER}\n```", [ONE]),
    ('{"name": "add", "arguments": {"s": "}\\"{ ```é\\u00e9"}}', "", [("add", '{"s": "}\\"{ ```é\\u00e9"}')]),
]
TEXTS = [
    "Hello.", "", " \n", "a < b { c ` d", "```python\nprint({})\n```\n", OTHER, f"```json\n{OTHER}\n```",
    f"Use `{ADD}`.",
    f"```json\n{ADD}\n```\nThat is how to add.", f"<tools>{ADD}</json>", f"<json>{ADD}\n```", f"{ADD} {OTHER}",
    f"[{ADD}]",
    '{"name": "add"}', '{"name": "add", "arguments": 5}', '{"name": "add", "arguments": null}', '{"name": "ad"}',
    '{"name": "add", "arguments": "five"}', '{"name": "add", "arguments": "[]"}', '{"name": "add", "description": "x"}',
    '{"name": "add", "arguments": {"a": 1}, "id": 1}', '{"name": "add", "arguments": {"a": NaN}}',
    '{"name": "add", "arguments": {"a": 1e999}}', '{"name": "add", "arguments": {"a": 1}', "{", "```json\n{", "<tools>",
    '{"name": "add", "arguments": {"a": "\\ud800"}}', '{"name": "add", "arguments": ' + '{"a": ' * 3000,
    '{"name": "add", "arguments": {"a": ' + "1" * 5000 + "}}", f"{ADD}{{",
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), [*CALLS, *((text, text, []) for text in TEXTS)])
def test_the_end_of_an_answer_that_is_a_call_of_a_declared_tool_is_a_call(text, content, calls):
    cuts = [[text], *([text[:at], text[at:]] for at in range(1, min(len(text), 120)))]
    if len(text) > 1000:
        cuts = [[text[at : at + 100] for at in range(0, len(text), 100)], [text]]
    assert all(read(pieces) == (content, calls) for pieces in [*cuts, [*text[:1000], text[1000:]]])


@pytest.mark.parametrize(
    "text",
    [
        "{x",
        '{"x',
        '{"name": "B',
        '{"name": "add"}',
        '{"name": "add", "d',
        '{"arguments": [',
        '{"arguments": {"a": 1}, "name": "B',
        '{"name": "add", "arguments": {x',
        '{"name": "add", "arguments": {"a": 01',
        '{"name": "add", "arguments": {"a": "b"},',
        f"{ADD}.",
        "```p",
        "<ta",
        f"```json\n{ADD}\n```\nT",
        f"```json\n{ADD}\n}}",
        f"<json>{ADD}</jt",
    ],
)
def test_text_is_held_back_up_to_the_character_that_rules_a_call_out(text):
    parser = BareParser(MarkedParser(NAMES), NAMES)
    assert not [event for letter in text[:-1] for event in parser.push(letter)]
    assert "".join(part.text for part in parser.push(text[-1])) == text


PARTS = ["```", "json", "\n", " ", "{", "}", '"', '{"name": ', '"add"', '"add', '"Bob"', ",", '"arguments": ', "{}",
         '"parameters":', '{"a": [1, "\\u00e9"]}', "<tools>", "</tools>", "<json>", "</json>", "</", "<", "`", ADD, ":",
         OTHER, "1", "-", "e", "nul", "\\", "\\ud83d", "a", "é", "<tool_call>", "</tool_call>", '"{\\"a\\": 1}"',
         "\u00a0"]  # fmt: skip
UNDECLARED = [part for part in PARTS if "add" not in part and "tool_call" not in part]


@given(
    parts=st.lists(st.sampled_from(PARTS), max_size=14),
    cut=st.booleans(),
    marked=st.sampled_from([MarkedParser, Llama3Parser]),
    data=st.data(),
)
def test_however_a_text_is_divided_its_calls_and_its_content_are_the_same(parts, cut, marked, data):
    text = "".join(parts)
    whole = read([text], cut, marked=marked)
    assert read(divided(data, text), cut, marked=marked) == whole == read(list(text), cut, marked=marked)


CALL_PARTS = [["", "So: "], ["", "```", "```json\n", "<tools>"], ["{"], ['"name": "add"', '"arguments": {"a": 1}'],
              [","], ['"parameters": {}', '"arguments": {"b": "}"}', '"name": "add"'], ["}"],
              ["", "\n```", "</tools>"], ["", ".", ADD]]  # fmt: skip


@given(parts=st.tuples(*map(st.sampled_from, CALL_PARTS)), end=st.integers(0, 99), cut=st.booleans(), data=st.data())
def test_nearly_calls_are_read_the_same_too(parts, end, cut, data):
    text = "".join(parts)[:end]
    assert read(divided(data, text), cut) == read([text], cut) == read(list(text), cut)


@given(parts=st.lists(st.sampled_from(UNDECLARED) | st.text(max_size=3), max_size=14), data=st.data())
def test_text_without_a_declared_name_comes_out_byte_for_byte(parts, data):
    text = "".join(parts)
    assert read(divided(data, text)) == (text, [])


def test_of_several_calls_only_the_first_counts_where_one_is_allowed():
    assert read([f"{ADD}\n{ADD}"], several=False) == ("", [ONE])
    assert read([f"{ADD}<tool_call>{ADD}</tool_call>"], several=False) == ("", [ONE])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (ADD, "", [ONE]),
        ('{"name": "add", "arguments": {"a": [1', "", [("add", '{"a": [1')]),
        ('So:\n```json\n{"name": "add", "arguments": {"a', "So:", [("add", '{"a')]),
        ('{"name": "add", "arguments": "{\\"a\\"', "", [("add", '{"a"')]),
        ('{"name": "add", "arg', "", [("add", "")]),
        (ADD + '\n{"na', "", [ONE]),
        ('{"name": "ad', '{"name": "ad', []),
        ('{"arguments": {"a": 1', '{"arguments": {"a": 1', []),
        ("```json\n{", "```json\n{", []),
    ],
)
def test_a_call_that_a_limit_cuts_is_one_as_soon_as_it_has_its_name(text, content, calls):
    assert read([text], cut=True) == read(list(text), cut=True) == (content, calls)


def chat_of(**more):
    tools = [{"type": "function", "function": {"name": name, "strict": name == "add_all"}} for name in NAMES]
    body = {"model": "x", "messages": [{"role": "user", "content": "x"}], "tools": tools, **more}
    facts = ModelFacts("<tool_call>", [], [], True, None, context=99, sampling={}, size=0)
    return chat_for(ChatRequest.model_validate(body), facts)


FORM = {"response_format": {"type": "json_object"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({}, ["add"]),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ["add"]),
        ({"tool_choice": ALLOWED}, []),
        ({"tool_choice": "none"}, []),
        (FORM, []),
    ],
)
def test_calls_may_be_bare_where_the_choice_is_automatic(more, names):
    """But for calls that a grammar makes fit, and where JSON is what was asked for."""
    for tool in ("add", "add_all"):
        turn = chat_of(**more).turn()
        turn.take(TextPiece(text=ADD.replace('"add"', f'"{tool}"'), finish_reason="stop"))
        assert [call["function"]["name"] for call in turn.calls] == [name for name in names if name == tool]
        assert bool(turn.content) is (not turn.calls)


@pytest.mark.parametrize(
    ("more", "several"),
    [
        ({}, True),
        ({"parallel_tool_calls": False}, False),
        ({"tool_choice": "required"}, False),
        ({"tool_choice": "required", "parallel_tool_calls": True}, True),
        ({"tool_choice": NAMED}, False),
        ({"tool_choice": NAMED, "parallel_tool_calls": True}, False),
        ({"tool_choice": ALLOWED}, True),
    ],
)
def test_one_call_ends_an_answer_that_must_call_unless_it_says_otherwise(more, several):
    assert chat_of(**more).calls.requested.several is several


def test_an_answer_that_must_call_has_no_content():
    for text in ("\n<tool_call>\n{", "<tool_c", '\n<tool_call>\n{"name": "add_a'):
        turn = chat_of(tool_choice="required").turn()
        turn.take(TextPiece(text=text, finish_reason="length"))
        assert turn.message()["content"] in (None, "")
        assert turn.finish_reason == "length"


def test_a_thought_is_no_call():
    turn = OutputParser(ThinkTokens("<think>", "</think>", 9), BareParser(MarkedParser(NAMES), NAMES))
    turn.take(TextPiece(text=f"<think>{ADD}</think>{ADD}", finish_reason="stop"))
    assert (turn.reasoning, turn.content, len(turn.calls)) == (ADD, "", 1)
    assert json.loads(turn.calls[0]["function"]["arguments"]) == {"a": 1}
