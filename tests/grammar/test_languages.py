"""Regexes, choices, Lark and GBNF: random texts under them are of the language."""

from __future__ import annotations

import ast
import json
import re

import pytest
from walks import compiler, ends, ids_of, text_of, walk

from echo_trt.grammar.state import State

WALKS = 8
REGEXES = (
    "yes|no|maybe",
    "[a-z]{1,8}@[a-z]{1,8}\\.(com|org|net)",
    "(19|20)[0-9]{2}-(0[1-9]|1[0-2])",
    "\\+?[1-9][0-9]{6,12}",
    '"[^"\\n]{0,12}"',
    "(ab|ba)+",
    "a?b?c?d?",
    "[ぁ-ん]{2,5}( [ぁ-ん]{2,5})?",
    "(?i:select) [a-z]{1,6}(, [a-z]{1,6}){0,2};",
    "# [A-Z][a-z]{1,9}\\n\\n(- [a-z ]{1,12}\\n){1,3}",
    "🍣{1,3}|寿司",
    "[^a]",
    "(a+)+",
    "(a|a)*b{1,20}(c{1,20}){1,5}",
    "\\\\[tn]/\\[\\]\\{\\}",
    "a<think>b(<\\|end\\|>){1,2}",  # names of added tokens
)
CHOICES = (
    ["positive", "negative", "neutral"],
    ["a", "aa", "aaa", "aaaa"],
    ["yes", "yes, but", "yes, but not today"],
    ['say "hi"', "back\\slash", "line\nbreak", "tab\there"],
    ["日本", "日本語", "café", "Ω", "🍣"],
    ["/re/", "start: x", "| y", "{z}", " "],
    ["rub\x7fout", "\x7f", "\x00", "\x1b[0m", "\x80\x9f", "\u2028"],
    ["only"],
)
ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: value (("*" | "/") value)*
value: NUMBER | "(" sum ")"
NUMBER: /0|[1-9][0-9]{0,3}/
"""
SQL = """
start: "SELECT " columns " FROM " NAME (" WHERE " NAME " = " NUMBER)? ";"
columns: "*" | NAME (", " NAME)*
NAME: /[a-z_]{1,8}/
NUMBER: /[0-9]{1,4}/
"""
GBNF_LIST = """
# a list of numbers and strings
root ::= "[" (item ("," item)*)? "]"
item ::= number | string
number ::= "-"? ("0" | [1-9] [0-9]{0,3})
string ::= "\\"" [a-z ]* "\\""
"""
GBNF_POINTS = """
root ::= point{2,3}
point ::= "- " [A-Z] [a-z]{1,9} "\\n"
"""


def is_arithmetic(text: str) -> bool:
    tree = ast.parse(text, mode="eval")
    known = ast.Expression | ast.BinOp | ast.Constant | ast.operator
    return all(isinstance(node, known) for node in ast.walk(tree))


def is_sql(text: str) -> bool:
    name = "[a-z_]{1,8}"
    columns = f"(\\*|{name}(, {name})*)"
    return bool(re.fullmatch(f"SELECT {columns} FROM {name}( WHERE {name} = [0-9]{{1,4}})?;", text))


def is_list(text: str) -> bool:
    return all(isinstance(each, int | str) for each in json.loads(text))


def is_points(text: str) -> bool:
    return bool(re.fullmatch("(- [A-Z][a-z]{1,9}\n){2,3}", text))


GRAMMARS = {
    "lark arithmetic": (ARITHMETIC, is_arithmetic),
    "lark SQL": (SQL, is_sql),
    "GBNF list": (GBNF_LIST, is_list),
    "GBNF points": (GBNF_POINTS, is_points),
}


@pytest.fixture(scope="module")
def grammars():
    return compiler()


def texts(state: State) -> list[str]:
    """Random texts, short and long."""
    return [text_of(walk(state, seed, 4 * seed)) for seed in range(WALKS)]


def takes(state: State | None, text: str) -> bool:
    """Whether a text is in the language, token by token."""
    for token in ids_of(text):
        state = state.after(token) if state else None
    return state is not None and state.after(0) is not None


@pytest.mark.parametrize("regex", REGEXES)
def test_texts_match_the_regex(grammars, regex):
    for text in texts(grammars.begin({"regex": regex})):
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice[0])
def test_texts_are_choices(grammars, choice):
    state = grammars.begin({"choice": choice})
    assert set(texts(state)) <= set(choice)
    assert all(takes(state, text) for text in choice)
    assert not takes(state, f"{choice[0]}!")


@pytest.mark.parametrize("structured", [{"choice": ["a <think>"]}, {"json": {"const": "a <think>"}}], ids=str)
def test_names_of_added_tokens_are_spelled_by_others(grammars, structured):
    """Where nothing else may follow, too."""
    assert {text.strip('"') for text in texts(grammars.begin(structured))} == {"a <think>"}


@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_are_of_the_grammar(grammars, name):
    grammar, holds = GRAMMARS[name]
    for text in texts(grammars.begin({"grammar": grammar})):
        assert holds(text), text


def test_texts_outside_a_grammar_are_forbidden(grammars):
    sums = grammars.begin({"grammar": ARITHMETIC})
    assert takes(sums, "1+2*(30-4)")
    assert not takes(sums, "1+")
    assert not takes(sums, "(1+2")
    points = grammars.begin({"grammar": GBNF_POINTS})
    assert takes(points, "- Ab\n- Cd\n")
    assert not takes(points, "- Ab\n")


def test_what_a_regex_leaves_no_choice_about_is_forced(grammars):
    state = grammars.begin({"regex": "Answer: (yes|no)\\."})
    assert "Answer: ".startswith(text_of(state.forced(8)))
    for token in ids_of("Answer: yes"):
        state = state.after(token)
    for token in state.forced(8):
        state = state.after(token)
    assert state.forced(8) == [ends()[0]], "one end is enough"
    assert state.after(ends()[0]).ended
