"""Texts that fit a format, of the default bundle, as OpenAI's client asks for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
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


CHAT = [{"role": "user", "content": "The weather in Paris as JSON, please."}]
SCHEMA = Weather.model_json_schema()
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}


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


@pytest.mark.parametrize(
    "requested",
    [
        {"response_format": FORM, "stream": True},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"extra_body": {"structured_outputs": {"json": json.dumps(SCHEMA)}}},
        {"extra_body": {"guided_json": SCHEMA}},
    ],
)
def test_every_spelling_of_a_schema(client, requested):
    answer = client.chat.completions.create(messages=CHAT, **requested, **ASK)
    if "stream" in requested:
        pieces = [piece for chunk in answer if (piece := chunk.choices[0].delta.content)]
        assert len(pieces) > 1
    else:
        pieces = [answer.choices[0].message.content]
    Weather.model_validate_json("".join(pieces))


@pytest.mark.parametrize(
    ("requested", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-[0-9]{2}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'start: "x" /[0-9]{2}/'}, "x[0-9]{2}"),
    ],
)
def test_other_kinds_in_both_endpoints(client, requested, pattern):
    chat = client.chat.completions.create(messages=CHAT, extra_body=requested, **ASK).choices[0].message.content
    text = client.completions.create(prompt="The sky is", extra_body=requested, **ASK).choices[0].text
    assert all(re.fullmatch(pattern, each, re.DOTALL) for each in (chat, text))


def test_the_context_holds_a_prompt_of_a_coding_agent_s_size(client):
    """Of opencode's first request: 26 tools, 7,645 tokens."""
    words = "Runs a command in a shell and returns what it prints, with the exit status, once it has ended, or not. "
    function = {"description": words * 6, "parameters": SCHEMA}
    tools = [{"type": "function", "function": function | {"name": f"tool_{i}"}} for i in range(26)]
    messages = [{"role": "system", "content": "Be brief. " * 40}, *CHAT]
    url = str(client.base_url).removesuffix("/v1/") + "/tokenize"
    answer = httpx.post(url, json={"messages": messages, "tools": tools}, timeout=60).json()
    assert 7_645 <= answer["count"] < answer["max_model_len"] == 8_192
