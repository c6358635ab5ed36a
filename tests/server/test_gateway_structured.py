"""Texts that fit a format, of the default bundle, as OpenAI's client asks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field
from server.running import asked_by_openai

openai = pytest.importorskip("openai", reason="needs the openai client: pip install openai")
DEFAULT = Path(__file__).parents[2] / "bundles/smollm2-135m"
pytestmark = pytest.mark.skipif(not DEFAULT.exists(), reason="bundles/smollm2-135m is not built")
ASK = {"model": "echo", "max_tokens": 200, "temperature": 0}


class Weather(BaseModel):
    city: str = Field(max_length=20)
    sky: Literal["blue", "grey"]
    degrees: int = Field(ge=-50, le=50)


FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}
CHAT = [{"role": "user", "content": "The weather in Paris as JSON, please."}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": Weather.model_json_schema()}}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with asked_by_openai(DEFAULT) as client:
        yield client


def test_a_pydantic_model_is_parsed(client):
    answer = client.chat.completions.parse(messages=CHAT, response_format=Weather, **ASK)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    assert answer.choices[0].finish_reason == "stop"
    turns = [*CHAT, answer.choices[0].message, {"role": "user", "content": "And in Rome?"}]
    again = client.chat.completions.parse(messages=turns, response_format=Weather, **ASK)
    assert isinstance(again.choices[0].message.parsed, Weather)


def test_a_schema_is_streamed_piece_by_piece(client):
    stream = client.chat.completions.create(messages=CHAT, response_format=FORM, stream=True, **ASK)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len([piece for piece in pieces if piece]) > 1
    Weather.model_validate_json("".join(pieces))


@pytest.mark.parametrize(
    "requested",
    [
        {"response_format": {"type": "json_object", "schema": Weather.model_json_schema()}},
        {"extra_body": {"structured_outputs": {"json": json.dumps(Weather.model_json_schema())}}},
        {"extra_body": {"guided_json": Weather.model_json_schema()}},
    ],
)
def test_other_spellings_of_a_schema(client, requested):
    answer = client.chat.completions.create(messages=CHAT, **requested, **ASK)
    Weather.model_validate_json(answer.choices[0].message.content)


def test_any_object_is_one(client):
    ask = ASK | {"max_tokens": 400}
    answer = client.chat.completions.create(messages=CHAT, response_format={"type": "json_object"}, **ask)
    text = answer.choices[0].message.content
    assert text.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("requested", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-[0-9]{2}"),
        ({"guided_regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'start: "x" /[0-9]{2}/'}, "x[0-9]{2}"),
    ],
)
def test_other_kinds_in_both_endpoints(client, requested, pattern):
    chat = client.chat.completions.create(messages=CHAT, extra_body=requested, **ASK)
    assert re.fullmatch(pattern, chat.choices[0].message.content)
    text = client.completions.create(prompt="The sky is", extra_body=requested, **ASK)
    assert re.fullmatch(pattern, text.choices[0].text)


def test_stop_tokens_end_a_text(client):
    plain = client.completions.create(prompt="One, two,", logprobs=0, **ASK | {"max_tokens": 6})
    token = plain.choices[0].logprobs.tokens[2]
    for candidate in client_tokens(token):
        stopped = client.completions.create(
            prompt="One, two,", extra_body={"stop_token_ids": [candidate]}, **ASK | {"max_tokens": 6}
        )
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.usage.completion_tokens <= 3


def client_tokens(text: str) -> list[int]:
    from echo_trt.models.tokenizer import load_tokenizer

    ids = load_tokenizer(DEFAULT)(text)["input_ids"]
    return ids if len(ids) == 1 else []


@pytest.mark.parametrize("stream", [False, True])
def test_the_default_model_takes_tools(client, stream):
    requested = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, **ASK}
    with client.chat.completions.stream(messages=CHAT, **requested) as events:
        choice = events.until_done().get_final_completion().choices[0]
    if not stream:
        choice = client.chat.completions.create(messages=CHAT, **requested).choices[0]
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    Weather.model_validate_json(call.function.arguments)
    turn = {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    answer = client.chat.completions.create(messages=[*CHAT, turn, result], tools=[TOOL], **ASK | {"max_tokens": 4})
    assert answer.choices[0].message.content


@pytest.mark.slow
def test_a_prompt_of_a_coding_agent_s_size_is_answered(client):
    """Of opencode's first request: 26 tools, 7,645 tokens."""
    words = "Runs a command in a shell and returns what it prints, with the exit status, once it has ended, or not. "
    function = TOOL["function"] | {"description": words * 6}
    tools = [{"type": "function", "function": function | {"name": f"tool_{i}"}} for i in range(26)]
    messages = [{"role": "system", "content": "Be brief. " * 40}, *CHAT]
    answer = client.chat.completions.create(messages=messages, tools=tools, **ASK | {"max_tokens": 4})
    assert 7_645 <= answer.usage.prompt_tokens < 8_192
    assert answer.usage.completion_tokens
