"""A call that ``max_tokens`` cuts, and the one call of an answer that must call, at every door of the same server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server.running import asked_at

MESSAGES = [{"role": "user", "content": "the theme of a thing"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "day": {"enum": ["Monday", "Tuesday"]}},
    "required": ["city", "day"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "the weather"}
FUNCTION = {"type": "function", "function": WEATHER | {"parameters": CITY}}
#: Door -> path, body without a limit, and the field of the limit.
DOORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "openai": ("/v1/chat/completions", {"tools": [FUNCTION], "tool_choice": "required"}, "max_tokens"),
    "responses": (
        "/v1/responses",
        {"tools": [WEATHER | {"type": "function", "parameters": CITY}], "tool_choice": "required"},
        "max_output_tokens",
    ),
    "anthropic": (
        "/v1/messages",
        {"tools": [WEATHER | {"input_schema": CITY}], "tool_choice": {"type": "any"}},
        "max_tokens",
    ),
}
WHOLE = 200


@pytest.fixture(scope="module")
def door(tool_bundle) -> Iterator[httpx.Client]:
    with asked_at(tool_bundle("qwen3")) as door:
        yield door


def ask(door: httpx.Client, name: str, limit: int, **changes: Any) -> tuple[str, list[str], str]:
    """Return the text, the calls' arguments and the end of a whole answer, as its dialect says them."""
    path, body, field = DOORS[name]
    given = {"input": MESSAGES} if name == "responses" else {"messages": MESSAGES}
    response = door.post(path, json={"model": "echo", "temperature": 0, **given, **body, field: limit} | changes)
    assert response.status_code == 200, response.text
    answer = response.json()
    if name == "openai":
        [choice] = answer["choices"]
        calls = [call["function"]["arguments"] for call in choice["message"].get("tool_calls") or ()]
        return choice["message"]["content"] or "", calls, choice["finish_reason"]
    if name == "responses":
        texts = [part["text"] for item in answer["output"] for part in item.get("content") or ()]
        calls = [item["arguments"] for item in answer["output"] if item["type"] == "function_call"]
        return "".join(texts), calls, (answer["incomplete_details"] or {"reason": answer["status"]})["reason"]
    texts = [block["text"] for block in answer["content"] if block["type"] == "text"]
    calls = [json.dumps(block["input"]) for block in answer["content"] if block["type"] == "tool_use"]
    return "".join(texts), calls, answer["stop_reason"]


ENDS = {
    "openai": ("tool_calls", "length"),
    "responses": ("completed", "max_output_tokens"),
    "anthropic": ("tool_use", "max_tokens"),
}


@pytest.mark.parametrize("name", DOORS)
def test_wherever_a_limit_cuts_a_call_no_markup_is_text(name, door):
    text, [whole], end = ask(door, name, WHOLE)
    assert (text, end) == ("", ENDS[name][0])
    assert json.loads(whole).keys() == {"city", "day"}
    partial, cut = set(), 0
    for limit in range(1, WHOLE):
        text, calls, end = ask(door, name, limit)
        if end == ENDS[name][0]:
            break
        cut += 1
        assert (text, end) == ("", ENDS[name][1])
        assert len(calls) <= 1
        for arguments in calls:
            assert whole.startswith(arguments) if name != "anthropic" else arguments == whole
            partial.add(arguments)
    assert cut > 10  # so that limits fell before the name, in it, and in the arguments
    assert len(partial) > (0 if name == "anthropic" else 5)  # this API has whole arguments alone


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("openai", {"parallel_tool_calls": True}),
        ("responses", {"parallel_tool_calls": True}),
        ("anthropic", {"tool_choice": {"type": "any", "disable_parallel_tool_use": False}}),
    ],
)
def test_one_call_ends_an_answer_that_must_call_unless_the_request_takes_several(name, several, door):
    _, calls, end = ask(door, name, WHOLE)
    assert (len(calls), end) == (1, ENDS[name][0])
    seeds = [ask(door, name, WHOLE, temperature=1, **several) for _ in range(6)]
    assert max(len(calls) for _, calls, _ in seeds) > 1
