"""The Messages API before a real engine, asked by Anthropic's own client; the model is tiny and speaks nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server.running import asked_at
from tool_models import CLOSED_NUMBER as NUMBER

anthropic = pytest.importorskip("anthropic", reason="needs the anthropic client: pip install anthropic")
ADD = {"name": "add", "description": "a sum", "input_schema": NUMBER, "cache_control": {"type": "ephemeral"}}
SEARCH = {"type": "web_search_20250305\r\né", "name": "web_search"}
USER = {"role": "user", "content": "the theme of a thing"}
THOUGHT = {"thinking": {"type": "enabled", "budget_tokens": 5}}
ASKED = {"model": "echo", "messages": [USER], "max_tokens": 400, "extra_body": {"seed": 3}, **THOUGHT}
CALLS = [{"type": "tool_use", "id": f"toolu_{i}", "name": "add", "input": {"n": i}} for i in (1, 2)]
HISTORY = [
    {"role": "user", "content": [{"type": "text", "text": "the theme", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "so", "signature": ""}, {"type": "text", "text": "add"}, *CALLS],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "seven"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "eight"}]},
            {"type": "text", "text": "and"},
        ],
    },
]
CHAT = [
    {"role": "system", "content": "naïve\nand brief"},
    {"role": "user", "content": "the theme"},
    {
        "role": "assistant",
        "content": "add",
        "reasoning_content": "so",
        "tool_calls": [
            {"id": f"toolu_{i}", "type": "function", "function": {"name": "add", "arguments": f'{{"n": {i}}}'}}
            for i in (1, 2)
        ],
    },
    {"role": "tool", "tool_call_id": "toolu_1", "content": "seven"},
    {"role": "tool", "tool_call_id": "toolu_2", "content": "eight"},
    {"role": "user", "content": "and"},
]


@pytest.fixture(scope="module")
def door(tool_bundle) -> Iterator[httpx.Client]:
    with asked_at(tool_bundle("thinking")) as door:
        yield door


@pytest.fixture(scope="module")
def client(door) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=str(door.base_url), api_key="any", max_retries=0)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [ADD], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, "tool_use"),
        ({"tools": [ADD, SEARCH], "tool_choice": {"type": "tool", "name": "add"}}, "tool_use"),
        ({"output_config": {"format": {"type": "json_schema", "schema": NUMBER}}}, "end_turn"),
        ({"max_tokens": 12, "system": "be brief"}, "max_tokens"),
        ({"max_tokens": 3}, "max_tokens"),
    ],
    ids=["any", "named", "format", "cut in its text", "cut in its thought"],
)
def test_events_tell_what_the_whole_answer_is(client, door, more, reason):
    requested = ASKED | more
    whole = client.messages.create(**requested)
    with client.messages.stream(**requested) as events:
        streamed = events.get_final_message()
    assert without_ids(streamed) == without_ids(whole)
    assert whole.stop_reason == reason
    first, *rest = whole.content
    assert first.type == "thinking"
    assert first.thinking
    if reason == "tool_use":
        assert [(call.name, call.input["n"] in range(10)) for call in rest] == [("add", True)]
    elif reason == "end_turn":
        assert json.loads(rest[0].text)["n"] in range(10)
    usage = whole.usage
    assert (usage.output_tokens == requested["max_tokens"]) == (reason == "max_tokens")
    counted = {name: value for name, value in requested.items() if name not in ("max_tokens", "extra_body")}
    prompt = client.messages.count_tokens(**counted).input_tokens
    assert prompt == usage.input_tokens + usage.cache_read_input_tokens


def without_ids(message: Any) -> dict[str, Any]:
    """Return what is the same each time: the second finds the prompt in the prefix cache."""
    raw = message.to_dict()
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in raw["content"]]
    return raw | {"id": None, "content": blocks, "usage": message.usage.output_tokens}


def test_the_text_is_the_chat_s_and_ends_at_a_stop_sequence(client, door):
    requested = ASKED | {"max_tokens": 40}
    text = client.messages.create(**requested).content[-1].text
    chat = {"model": "echo", "messages": [USER], "max_tokens": 40, "thinking_token_budget": 5, "seed": 3}
    assert door.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == text
    stop = text[3:5]
    for answer in (
        client.messages.create(**requested, stop_sequences=["\x00", stop]),
        client.messages.stream(**requested, stop_sequences=["\x00", stop]).__enter__().get_final_message(),
    ):
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
        assert answer.content[-1].text == text[: text.index(stop)]


def test_a_history_of_blocks_is_the_chat_s(client, door):
    system = [{"type": "text", "text": text} for text in ("naïve", "and brief")]
    counted = client.messages.count_tokens(model="echo", system=system, messages=HISTORY, tools=[ADD])
    function = {"name": "add", "description": "a sum", "parameters": NUMBER}
    chat = {"messages": CHAT, "tools": [{"type": "function", "function": function}]}
    assert counted.input_tokens == door.post("/tokenize", json=chat).json()["count"]


def test_what_changes_no_text_is_accepted_and_servers_tools_are_left_out(client):
    about = {"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}
    header = {"anthropic-beta": "context-management-2025-06-27", "anthropic-version": "2023-06-01"}
    requested = ASKED | {"max_tokens": 3, "tools": [SEARCH], "extra_headers": header, "extra_body": about}
    answer = client.messages.with_raw_response.create(**requested)
    assert answer.headers["X-Tools-Left-Out"] == "web_search"
    assert answer.parse()._request_id == answer.headers["X-Request-Id"]


def content(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}, USER]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            content({"type": "image", "source": {}}),
            "messages.0.content.0 is of type 'image', and this model",
        ),
        (content({"type": "document"}), "messages.0.content.0 is of type 'document'"),
        (content(CALLS[0] | {"input": "{}"}, role="assistant"), "messages.0.content.0.input is '{}': give an object."),
        (content(CALLS[0] | {"name": "a b"}, role="assistant"), "messages.0.content.0.name is 'a b'"),
        (
            content({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}),
            "messages.0.content.0.content.0 is of type 'image'",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "The"}]}, "messages.1.role is 'assistant'"),
        ({"messages": [USER | {"tools": [1]}]}, "messages.0.tools is a list of 1"),
        ({"messages": [USER | {"content": []}]}, "messages.0.content is a list of 0: give a string, or blocks."),
        ({"messages": []}, "messages is a list of 0: give 1 to 2048 messages."),
        ({"system": [{"type": "image"}]}, "system.0 is of type 'image'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": 3}, "temperature is 3"),
        ({"stop_sequences": [""]}, "stop_sequences.0 is ''"),
        ({"tools": [SEARCH, ADD | {"name": "a b"}]}, "tools.1.name is 'a b'"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type is 'bash_20250124': this model needs a"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema is missing."),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice names 'g'"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens is -1"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format has no type that is known here"),
        ({"mcp_servers": [{}]}, "mcp_servers is a list of 1, which this engine does not support; leave it out."),
        ({"stop": "x"}, "stop is 'x', which this engine does not support"),
        ({"temprature": 1}, "temprature is 1, but no field has this name; did you mean temperature?"),
        ({"model": "claude"}, "The model 'claude' does not exist here; ask for 'echo'."),
    ],
)
def test_a_refusal_names_the_field_of_this_api(client, change, sentence):
    with pytest.raises(anthropic.APIStatusError) as refused:
        client.messages.create(**(ASKED | {"extra_body": change}))
    status, kind = (404, "not_found_error") if "claude" in sentence else (400, "invalid_request_error")
    assert (refused.value.status_code, refused.value.body["error"]["type"]) == (status, kind)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"]["message"].startswith(sentence)
