"""A choice's text as the parts of a message: the thought is split off, calls are read, tokens are counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.engine.text.prompts import ThinkTokens
from echo_trt.server.text_client import TextPiece
from echo_trt.server.tool_formats.marked import MarkedParser
from echo_trt.server.turns import OutputParser

MARKS = ThinkTokens("<think>", "</think>", 9)
CALL = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'


def read(pieces: list[str], inside: bool = False, tools: bool = True) -> dict[str, Any]:
    turn = OutputParser(MARKS, MarkedParser({"add": {}}) if tools else None)
    for index, text in enumerate(pieces):
        last = "stop" if index == len(pieces) - 1 else None
        turn.take(TextPiece(text=text, finish_reason=last, in_thought=inside and index == 0))
    return turn.message()


CASES = [
    # text, whether the prompt opened the thought, thought, content, calls
    ("Hello.", False, "", "Hello.", 0),
    ("", False, "", "", 0),
    ("<think>\nHm.\n</think>\n\nHello.\n", False, "Hm.", "Hello.\n", 0),
    ("\n<think>Hm. </think>Hello.", False, "Hm.", "Hello.", 0),
    ("Hm.\n\nWell.\n</think>\n\nHello.", True, "Hm.\n\nWell.", "Hello.", 0),
    ("\n<think>\nHm.</think>Hello.", True, "Hm.", "Hello.", 0),
    ("Hm", True, "Hm", None, 0),
    ("</think>Hello.", True, "", "Hello.", 0),
    ("a </thin", True, "a </thin", None, 0),
    ("<thin air", False, "", "<thin air", 0),
    ("Hello <think>x</think>", False, "", "Hello <think>x</think>", 0),
    ("Hm.</think>\n" + CALL, True, "Hm.", None, 1),
    ("Call " + CALL + "?</think> So:\n" + CALL + CALL, True, "Call " + CALL + "?", "So:", 2),
    ("<t", False, "", "<t", 0),
    (" <think>", False, "", "", 0),
    ("<think><think>Hm.</think>Hello.", True, "<think>Hm.", "Hello.", 0),
    ("<think> <think>Hm.</think>Hello.", False, "<think>Hm.", "Hello.", 0),
]


@given(data=st.data(), case=st.sampled_from(CASES))
def test_however_a_text_is_cut_its_parts_are_the_same(data, case):
    text, inside, reasoning, content, calls = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]
    for each in (pieces, [text], list(text) or [""]):
        body = read(each, inside)
        assert body.get("reasoning_content", "") == body.get("reasoning", "") == reasoning
        assert body["content"] == content
        assert len(body.get("tool_calls", ())) == calls


def test_without_tools_calls_are_text():
    assert read([CALL], tools=False)["content"] == CALL


@pytest.mark.parametrize(
    ("ids", "inside", "texts", "count"),
    [
        ([[1, 2], [3, 9, 4], [5]], True, ["a", "b</think>", "c"], 4),
        ([[1, 2], [3]], True, ["a", "b"], 3),
        ([[1, 2], [3]], False, ["a", "b"], 0),
        ([[8, 1], [9, 3]], False, ["<think>a", "</think>b"], 3),
    ],
)
def test_tokens_of_the_thought_are_counted(ids, inside, texts, count):
    turn = OutputParser(MARKS)
    for index, (own, text) in enumerate(zip(ids, texts, strict=True)):
        last = "stop" if index == len(ids) - 1 else None
        turn.take(TextPiece(text=text, finish_reason=last, token_ids=own, in_thought=inside))
    assert turn.reasoning_tokens == count


@pytest.mark.parametrize(
    ("text", "end", "reason"), [(CALL, "stop", "tool_calls"), (CALL, "length", "length"), ("", "stop", "stop")]
)
def test_the_reason_is_tool_calls_only_where_the_text_ended(text, end, reason):
    turn = OutputParser(None, MarkedParser({"add": {}}))
    turn.take(TextPiece(text=text, finish_reason=end))
    assert turn.finish_reason == reason
