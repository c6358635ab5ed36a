"""What the gateway says of formats, tools and thoughts before the engine is asked: no engine is there."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from gateway.running import refused, running

TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running() as client:
        yield client


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"tools": TOOLS, "tool_choice": NAMED, "guided_json": {}}, "guided_json"),
        ({"tools": TOOLS * 2}, "tools.1.function.name"),
        ({"tools": TOOLS * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": [1] * 9}, "stop_token_ids"),
    ],
)
def test_a_request_is_refused_by_field(client, change, param):
    sentence = refused(client.post("/v1/chat/completions", json=CHAT | change), 400, param)
    assert param.split(".")[0] in sentence


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}],
            },
            "arguments is '{': give a JSON object, written as a string.",
        ),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "only the role assistant has tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": [CALL] * 129}, "a list of 129: give at most 128 calls."),
    ],
)
def test_what_is_wrong_with_a_call_is_said(client, message, sentence):
    response = client.post("/v1/chat/completions", json=CHAT | {"messages": [*CHAT["messages"], message]})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert "messages.1" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": "none", "guided_regex": "a"},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL | {"index": 0}], "parsed": None}]},
        {"response_format": {"type": "json_object", "schema": {}}, "reasoning_effort": "none"},
        {"structured_outputs": {"json": "{}", "regex": None}, "guided_json": None},
        {"messages": [*CHAT["messages"], {"role": "tool", "content": [{"type": "text", "text": "5"}]}]},
    ],
)
def test_what_clients_send_passes_to_the_engine(client, change):
    refused(client.post("/v1/chat/completions", json=CHAT | change), 503)
