"""Calls of tools: parsers of texts in pieces, grammars of texts, and templates that are told apart."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tool_models
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.grammar.compiler import GrammarCompiler
from echo_trt.grammar.state import Vocabulary
from echo_trt.server.chats import chat_for
from echo_trt.server.schemas import ChatRequest
from echo_trt.server.text_client import ModelFacts
from echo_trt.server.tool_formats import format_of
from echo_trt.server.tool_formats.base import Arguments, Call, Content, ToolRequest, json_rule
from echo_trt.server.tool_formats.coder import Coder
from echo_trt.server.tool_formats.llama3 import Llama3, MistralList
from echo_trt.server.tool_formats.marked import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR, Marked

MARKS = ("<tool_call>", "</tool_call>")
#: Chat templates' marks by format, and its tokens of the tokenizer.
TAUGHT = {
    "hermes": ("<tool_call>", MARKS),
    "hermes, spelt": ("<tool_call>", ()),
    "coder": ("<tool_call>\n<function=", MARKS),
    "deepseek": (f"{CALLS}{CALL}```json", (CALLS, CALLS_END, CALL, CALL_END, SEPARATOR)),
    "deepseek 3.1": (f"{CALLS}{CALL}", (CALLS, CALLS_END, CALL, CALL_END, SEPARATOR)),
    "mistral": ("[TOOL_CALLS]x[ARGS]", ("[TOOL_CALLS]", "[ARGS]")),
    "mistral's list": ("[TOOL_CALLS] [", ("[TOOL_CALLS]",)),
}
FORMATS = {name: format_of(*taught) for name, taught in TAUGHT.items()} | {"llama3": Llama3()}
KINDS = {
    "n": {"type": "integer"},
    "o": {"type": ["number", "null"]},
    "s": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "l": {"$ref": "#/$defs/L"},
    "e": {"enum": [1, 2]},
    "b": {"const": True},
}
NAMES = {
    "get_weather": {"properties": {"city": {"type": "string"}}},
    "add": {"properties": KINDS, "$defs": {"L": {"type": "array"}}},
}
GET = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
PARIS = ("get_weather", '{"city": "Paris"}')


def read(name: str, pieces: list[str], several: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Content, and the calls with their arguments."""
    parser = FORMATS[name].parser(NAMES, several)
    content, calls = "", []
    for event in [event for piece in pieces for event in parser.push(piece)] + parser.finish():
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, Call):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, calls


@pytest.mark.parametrize("name", FORMATS)
def test_the_known_parts_of_a_call_and_its_values_are_a_call(name):
    city = FORMATS[name].parts("get_weather", NAMES["get_weather"])
    numbers = FORMATS[name].parts("add", {"properties": {"n": KINDS["n"], "e": KINDS["e"]}})
    assert read(name, ["Paris".join(city)]) == ("", [PARIS])
    assert read(name, ["2".join(numbers)]) == ("", [("add", '{"n": 2, "e": 2}')])
    assert read(name, [*FORMATS[name].parts("add", {})]) == ("", [("add", "{}")])


@pytest.mark.parametrize(("choice", "known"), [("auto", 2), ("none", 0), ("required", 0)])
def test_a_chat_brings_what_is_known_of_its_calls_where_no_grammar_does(choice, known):
    tools = [{"type": "function", "function": {"name": name, "parameters": {"n": {}}}} for name in NAMES]
    body = {"model": "x", "messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": choice}
    facts = ModelFacts("<tool_call>", [], [], True, None, context=99, sampling={}, size=0)
    chat = chat_for(ChatRequest.model_validate(body), facts)
    assert len(chat.prompt.calls) == known
    assert (chat.structured is None) == (choice != "required")


HERMES = [
    ("Hello.", "Hello.", []),
    (f"<tool_call>\n{GET}\n</tool_call>", "", [PARIS]),
    (f"Let me look.\n\n<tool_call>\n{GET}\n</tool_call>\n", "Let me look.", [PARIS]),
    (f"<tool_call>\n{GET}\n</tool_call>\n<tool_call>\n{GET}\n</tool_call>", "", [PARIS, PARIS]),
    (f"<tool_call>{GET}</tool_call> and more", " and more", [PARIS]),
    ('<tool_call>\n{"name": "add", "arguments": {"a": [1, {"b": "}\\""}], "c": "</tool_call>"}}\n</tool_call>x',
     "x", [("add", '{"a": [1, {"b": "}\\""}], "c": "</tool_call>"}')]),
    ('<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>', "", [("add", '{"a": 1}')]),
    ('<tool_call>\n{"name": "add", "arguments": "{\\"a\\": 1}"}\n</tool_call>', "", [("add", '{"a": 1}')]),
    ('<tool_call>\n{"name": "add"}\n</tool_call>', "", [("add", "{}")]),
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1\n</tool_call>\nx', "\nx", [("add", '{"a": 1\n')]),
    ("<tool_call>\nno JSON\n</tool_call> x", "<tool_call>\nno JSON\n</tool_call> x", []),
    ('a\n<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
     'a\n<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', []),
    ('<tool_call>{"arguments": {"a": NaN}, "name": "add"}</tool_call>',
     '<tool_call>{"arguments": {"a": NaN}, "name": "add"}</tool_call>', []),
    ('<tool_call>{"arguments": {"a": 1e999}, "name": "add"}</tool_call>',
     '<tool_call>{"arguments": {"a": 1e999}, "name": "add"}</tool_call>', []),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": -Infinity}"}</tool_call>',
     '<tool_call>{"name": "add", "arguments": "{\\"a\\": -Infinity}"}</tool_call>', []),
    ('<tool_call>{"arguments": {"a": "\\ud800é", "b": 1.5e3}, "name": "add"}</tool_call>', "",
     [("add", '{"a": "\\ud800\\u00e9", "b": 1500.0}')]),
    ("a <tool_cal", "a <tool_cal", []),
    ("<tool_call>\n[1]</tool_call><tool_call>7</tool_call><tool_call>" + "[" * 3000,
     "<tool_call>\n[1]</tool_call><tool_call>7</tool_call><tool_call>" + "[" * 3000, []),
]  # fmt: skip
LLAMA = [
    ("Hello.", "Hello.", []),
    ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ('\n{"name": "add", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Paris"}}\n', "",
     [("add", "{}"), PARIS]),
    ('{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    ('{"name": "add", "parameters": {"a": 1}} Done.', " Done.", [("add", '{"a": 1}')]),
    ('{"name": "Ann", "parameters": {"a": 1}}', '{"name": "Ann", "parameters": {"a": 1}}', []),
    ('{"type": "function", "name": "add", "parameters": {"a": NaN}}',
     '{"type": "function", "name": "add", "parameters": {"a": NaN}}', []),
    ("{", "{", []),
    ('{"name": "add", "parameters": {"a"', "", [("add", '{"a"')]),
    ('Use {"name": "add", "parameters": {}}', 'Use {"name": "add", "parameters": {}}', []),
    ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
]  # fmt: skip
V3 = f'{CALL}function{SEPARATOR}get_weather\n```json\n{{"city": "Paris"}}\n```{CALL_END}'
OTHERS = [
    ("deepseek", f"I look.\n{CALLS}{V3}\n{V3}{CALLS_END}", "I look.", [PARIS, PARIS]),
    ("deepseek", f"{CALLS}{V3.replace(f'```{CALL_END}', CALL_END)} x", " x", [PARIS]),
    ("deepseek", f"{CALLS}{V3.partition('ris')[0]}", "", [("get_weather", '{"city": "Pa')]),
    ("deepseek", f"{CALLS}{CALL}function{SEPARATOR}nobody\n```json\n{{}}\n```{CALL_END}",
     f"{CALLS}{CALL}function{SEPARATOR}nobody\n```json\n{{}}\n```{CALL_END}", []),
    ("deepseek 3.1", f"{CALLS}{CALL}add{SEPARATOR}{{\"a\": 1}}{CALL_END}{CALL}add{SEPARATOR}{{}}{CALL_END}{CALLS_END}",
     "", [("add", '{"a": 1}'), ("add", "{}")]),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": "[TOOL_CALLS]"}[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]'
     '{"city": "Paris"}', "", [("add", '{"a": "[TOOL_CALLS]"}'), PARIS]),
    ("mistral", "So [TOOL_CALLS]nobody[ARGS]{}", "So [TOOL_CALLS]nobody[ARGS]{}", []),
    ("mistral's list", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": '
     '{"city": "Paris"}}]', "", [("add", '{"a": 1}'), PARIS]),
    ("mistral's list", '[TOOL_CALLS][{"name": "add", "arguments": {}, "id": "a1B2c3D4e"}]', "", [("add", "{}")]),
    ("coder", "Well.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
     "</tool_call>\n<tool_call>\n<function=add>\n</function>\n</tool_call>", "Well.", [PARIS, ("add", "{}")]),
    ("coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\n<b>\n\"5\"\n</parameter></function></tool_call>",
     "", [("get_weather", '{"city": "<b>\\n\\"5\\""}')]),
    ("coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar", "", [("get_weather", "")]),
    ("coder", "<tool_call>\n<function=add>\n" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in (
        ("n", "5"), ("o", "None"), ("s", "5"), ("l", '["a"]'), ("e", "2"), ("b", "True"), ("x", "1"), ("n", "five")))
     + "</function>\n</tool_call>", "",
     [("add", '{"n": 5, "o": null, "s": "5", "l": ["a"], "e": 2, "b": true, "x": "1", "n": "five"}')]),
    ("coder", "<tool_call><function=add>" + "<" * 5000 + "</function></tool_call>", "", [("add", "{}")]),
    ("coder", "<tool_call>\n<function=nobody>\n</function>\n</tool_call>",
     "<tool_call>\n<function=nobody>\n</function>\n</tool_call>", []),
]  # fmt: skip
CASES = [("hermes", *case) for case in HERMES] + [("llama3", *case) for case in LLAMA] + OTHERS


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_however_a_text_is_cut_it_is_read_the_same(name, text, content, calls):
    cuts = [[text], list(text), *([text[:at], text[at:]] for at in range(1, min(len(text), 200)))]
    assert all(read(name, pieces) == (content, calls) for pieces in cuts)


PARTS = ["<tool_call>", "</tool_call>", "\n", " ", "{", "}", '"', '{"name": "add", ', '"arguments": {', '"parameters":',
         "a", "\\", ";", GET, "[", "<", "<|python_tag|>", '"name"', "é", "[TOOL_CALLS]", "add", "[ARGS]", CALLS, CALL,
         SEPARATOR, CALL_END, "<function=add>", "<parameter=", ">", "</parameter>", "</function>"]  # fmt: skip


@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), name=st.sampled_from([*FORMATS]), data=st.data())
def test_nonsense_is_read_the_same_and_raises_nothing(parts, name, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]
    assert read(name, pieces) == read(name, [text]) == read(name, list(text))


def test_the_name_comes_before_the_arguments_and_those_as_they_come():
    parser = FORMATS["hermes"].parser(NAMES)
    assert parser.push('<tool_call>\n{"name": "add", "argu') == []
    assert parser.push('ments": {') == [Call("add"), Arguments("{")]
    assert parser.push('"a": 1') == [Arguments('"a": 1')]
    assert parser.push("}}\n</tool_call>") == [Arguments("}")]


def test_of_several_calls_only_the_first_counts_where_one_is_allowed():
    call = f"<tool_call>\n{GET}\n</tool_call>"
    assert read("hermes", [f"{call}\n{call}"], several=False) == ("", [PARIS])


# -- grammars --------------------------------------------------------------------------------------------------------

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Paris", "Rome"]}},
}
TOOLS = {"get_weather": CITY, "add": {"type": "object"}}


@pytest.fixture(scope="module")
def fits():
    """format, grammar, text -> whether the text fits; asked of the tokens of the text."""
    shown = [*dict.fromkeys(mark for _, marks in TAUGHT.values() for mark in marks)]
    with_marks = tool_models.tokenizer(None, tool_models.QWEN_SPECIAL, shown, eos_token="<|im_end|>")
    without = tool_models.llama3_tokenizer()
    compilers = {
        each: GrammarCompiler(each.backend_tokenizer.to_str(), Vocabulary(len(each), (each.eos_token_id,)))
        for each in (with_marks, without)
    }

    def requested(name: str, grammar: str, text: str) -> bool:
        tokenizer = with_marks if FORMATS[name].tokens else without
        end = tokenizer.eos_token_id
        state: Any = compilers[tokenizer].begin({"grammar": grammar})
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], end]:
            state = state.after(token)
            if state is None:
                return False
        return True

    return requested


def written(name: str, *calls: tuple[str, str]) -> str:
    match name:
        case "llama3":
            return "; ".join(f'{{"name": "{f}", "parameters": {a}}}' for f, a in calls)
        case "mistral's list":
            return "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{f}", "arguments": {a}}}' for f, a in calls) + "]"
        case "mistral":
            return "".join(f"[TOOL_CALLS]{f}[ARGS]{a}" for f, a in calls)
        case "deepseek":
            texts = [f"{CALL}function{SEPARATOR}{f}\n```json\n{a}\n```{CALL_END}" for f, a in calls]
            return CALLS + "\n".join(texts) + CALLS_END
        case "deepseek 3.1":
            return CALLS + "".join(f"{CALL}{f}{SEPARATOR}{a}{CALL_END}" for f, a in calls) + CALLS_END
        case "coder":
            return "\n".join(f"<tool_call>\n<function={f}>\n{coded(a)}</function>\n</tool_call>" for f, a in calls)
    return "\n".join(f'<tool_call>\n{{"name": "{f}", "arguments": {a}}}\n</tool_call>' for f, a in calls)


def coded(arguments: str) -> str:
    """Write arguments as Qwen3-Coder does."""
    given = {name: each if isinstance(each, str) else json.dumps(each) for name, each in json.loads(arguments).items()}
    return "".join(f"<parameter={name}>\n{each}\n</parameter>\n" for name, each in given.items())


ADD, BAD = ("add", '{"x": [1, 2]}'), ("get_weather", '{"city": "Oslo"}')


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_must_come_fits_its_schema(fits, name):
    grammar = FORMATS[name].grammar(ToolRequest(TOOLS, call_required=True, several=True))
    assert fits(name, grammar, written(name, PARIS))
    assert fits(name, grammar, written(name, PARIS, ADD, PARIS))
    assert not fits(name, grammar, written(name, BAD))
    assert not fits(name, grammar, written(name, ("other", "{}")))
    assert not fits(name, grammar, "Hello.")
    assert not fits(name, grammar, "")
    one = FORMATS[name].grammar(ToolRequest(TOOLS, call_required=True, several=False))
    assert fits(name, one, written(name, PARIS))
    assert not fits(name, one, written(name, PARIS, ADD))


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_that_may_come_fits_too_and_text_is_free(fits, name):
    grammar = FORMATS[name].grammar(ToolRequest(TOOLS, call_required=False, several=True))
    for text in ("Hello.", "", "a < b", written(name, PARIS), written(name, PARIS, ADD)):
        assert fits(name, grammar, text), text
    assert not fits(name, grammar, written(name, BAD))
    assert fits(name, grammar, "So: " + written(name, PARIS))
    if name not in ("llama3", "mistral's list"):
        assert not fits(name, grammar, "So: " + written(name, BAD))
        assert not fits(name, grammar, f"So: {FORMATS[name].spelling.opens[0]}\nhello")
        one = FORMATS[name].grammar(ToolRequest(TOOLS, call_required=False, several=False))
        assert fits(name, one, "So: " + written(name, PARIS))
        assert not fits(name, one, written(name, PARIS, PARIS))


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_that_calls_nothing_may_have_to_fit_as_well(fits, name):
    content = json_rule({"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False})
    grammar = FORMATS[name].grammar(ToolRequest(TOOLS, call_required=False, several=True, content=content))
    assert fits(name, grammar, '{"n": 5}')
    assert fits(name, grammar, written(name, PARIS))
    assert not fits(name, grammar, "Hello.")


@pytest.mark.parametrize(
    ("template", "kind", "several"),
    [
        (tool_models.QWEN3, Marked, True),
        (tool_models.QWEN3_THINKING, Marked, True),
        (tool_models.LLAMA3, Llama3, False),  # it refuses several calls
        (tool_models.QWEN3.replace("<tool_call>", "<tool_call><function=x>"), Coder, True),
        ("{{ '[TOOL_CALLS]' }}", MistralList, True),
        ("", type(None), None),
    ],
)
def test_formats_are_told_by_the_template(template, kind, several):
    found = format_of(template)
    assert isinstance(found, kind)
    assert getattr(found, "several", None) is several


def test_arguments_in_tags_fit_their_schema(fits):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9}, "note": {"type": "string"}, "l": {"$ref": "#/$defs/L"}},
        "required": ["n", "note"],
        "$defs": {"L": {"type": "array", "items": {"enum": ["a", 1]}}},
    }
    grammar = FORMATS["coder"].grammar(ToolRequest({"f": schema}, call_required=True, several=False))
    for arguments, fit in (
        ('{"n": 5, "note": "a <b>\\n\\"c\\""}', True),
        ('{"n": 5, "note": "", "l": ["a", 1]}', True),
        ('{"n": 50, "note": "x"}', False),
        ('{"n": 5}', False),
        ('{"n": 5, "note": "x", "l": ["b"]}', False),
        ('{"n": 5, "note": "x", "m": 1}', False),
    ):
        assert fits("coder", grammar, written("coder", ("f", arguments))) is fit, arguments
