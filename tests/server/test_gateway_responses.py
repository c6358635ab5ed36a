"""The Responses API and tokens before a real engine, asked by OpenAI's own client; the model speaks nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
import tool_models
from pydantic import BaseModel
from server.running import asked_by_openai
from tool_models import CLOSED_NUMBER as NUMBER

openai = pytest.importorskip("openai", reason="needs the openai client: pip install openai")
ADD = {"type": "function", "name": "add", "description": "a sum", "parameters": NUMBER, "strict": True}
SUB = ADD | {"name": "subtract"}
ALLOWED = {"type": "function", "name": "add"}
CALLED = {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "call_1", "name": "add"}
HISTORY = [
    {"role": "user", "content": [{"type": "input_text", "text": "the theme"}, {"type": "input_text", "text": " of"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
    CALLED | {"arguments": '{"n": 5}'},
    CALLED | {"call_id": "call_2", "arguments": '{"n": 6}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "seven"},
    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "eight"}]},
]
CHAT = [
    {"role": "system", "content": "naïve"},
    {"role": "user", "content": "the theme of"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": "add", "arguments": f'{{"n": {n}}}'}}
            for i, n in ((1, 5), (2, 6))
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "seven"},
    {"role": "tool", "tool_call_id": "call_2", "content": "eight"},
]
CHAT_TOOL = {"type": "function", "function": {name: value for name, value in ADD.items() if name != "type"}}


@pytest.fixture(scope="module")
def client(tool_bundle) -> Iterator[openai.OpenAI]:
    with asked_by_openai(tool_bundle("thinking"), names=("tiny/thinker", "echo")) as client:
        yield client


def body(budget: int = 5, **more: Any) -> dict[str, Any]:
    return {"extra_body": {"thinking_token_budget": budget, "seed": 3, **more}}


ASKED = {"model": "echo", "input": "the theme of a thing", "max_output_tokens": 400}


@pytest.mark.parametrize(
    "more",
    [
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": NUMBER, "strict": True}}},
        {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}},
        {
            "tools": [SUB, ADD],
            "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [ALLOWED]},
            "parallel_tool_calls": False,
        },
        {"max_output_tokens": 12, "instructions": "be brief"},
        {"max_output_tokens": 3},
    ],
    ids=["format", "required", "named", "allowed", "cut in its text", "cut in its thought"],
)
def test_events_tell_what_the_whole_answer_is(client, more):
    requested = ASKED | more | body()
    whole = client.responses.create(**requested)
    events = list(client.responses.create(**requested, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.output == []
    assert events[0].response.status == "in_progress"
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert without_ids(last.response) == without_ids(whole)
    assert without_ids(last.response)["output"] == without_ids(put_together(events))["output"]
    cut = whole.usage.output_tokens == requested["max_output_tokens"]
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        ("incomplete", "max_output_tokens") if cut else ("completed", None)
    )
    assert cut == ("max_output_tokens" in more)
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert whole.output[0].type == "reasoning"
    assert whole.output[0].content[0].text
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens <= 6


def without_ids(response: Any) -> dict[str, Any]:
    """Return what is the same each time."""
    raw = response if isinstance(response, dict) else response.to_dict()
    own = {"id", "call_id", "created_at", "completed_at", "usage"}  # the second finds the prompt in the prefix cache
    return {
        name: [without_ids(item) for item in value] if name == "output" else value
        for name, value in raw.items()
        if name not in own
    }


def put_together(events: list[Any]) -> dict[str, Any]:
    """Return the output that a client makes of the deltas, checked against each event that repeats it."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event.type.removeprefix("response.")
        if kind == "output_item.added":
            assert event.output_index == len(items)
            items.append(event.item.to_dict())
        elif hasattr(event, "item_id"):
            item = items[event.output_index]
            assert item["id"] == event.item_id
            if kind == "content_part.added":
                assert event.content_index == len(item["content"])
                item["content"].append(event.part.to_dict())
            elif kind.endswith("text.delta"):
                item["content"][event.content_index]["text"] += event.delta
            elif kind.endswith("text.done"):
                assert item["content"][event.content_index]["text"] == event.text
            elif kind == "function_call_arguments.delta":
                item["arguments"] += event.delta
            elif kind == "function_call_arguments.done":
                assert item["arguments"] == event.arguments
            else:
                assert kind == "content_part.done"
                assert item["content"][event.content_index] == event.part.to_dict()
        elif kind == "output_item.done":
            done = event.item.to_dict()
            assert items[event.output_index] | {"status": done["status"]} == done
            items[event.output_index] = done
    return {"output": items}


def test_calls_fit_and_go_back_with_their_results(client):
    requested = ASKED | {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False} | body()
    answer = client.responses.create(**requested)
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "add"
    assert json.loads(call.arguments)["n"] in range(10)
    assert call.call_id.startswith("call_")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    given = [{"role": "user", "content": ASKED["input"]}, *answer.output, result]
    again = client.responses.create(**requested | {"input": given, "tool_choice": "auto"})
    assert again.usage.input_tokens > answer.usage.input_tokens


def test_a_history_is_the_chat_that_it_stands_for(client):
    ours = {"model": "echo", "input": HISTORY, "instructions": "naïve", "tools": [ADD], "tool_choice": "none"}
    response = client.responses.create(**ours, max_output_tokens=16, temperature=0)
    chat = client.chat.completions.create(
        model="echo", messages=CHAT, tools=[CHAT_TOOL], tool_choice="none", max_tokens=16, temperature=0
    )
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    [reasoning] = response.output
    assert reasoning.content[0].text == chat.choices[0].message.reasoning_content


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_a_namespace_s_functions_name_the_namespace(client, stream):
    """As Codex sends them, beside a tool that OpenAI's servers run: that one is left out, and the answer says so."""
    space = {"type": "namespace", "name": "team.v1", "description": "x", "tools": [ADD | {"name": "sum"}]}
    tools = [{"type": "web_search", "external_web_access": False}, space]
    named = {"tool_choice": {"type": "function", "name": "sum", "namespace": "team.v1"}}
    requested = ASKED | body() | {"tools": tools, **named}
    whole = client.responses.with_raw_response.create(**requested)
    assert whole.headers["X-Tools-Left-Out"] == "web_search"
    assert [tool.type for tool in whole.parse().tools] == ["namespace"]
    output = whole.parse().to_dict()["output"]
    if stream:
        output = put_together(list(client.responses.create(**requested, stream=True)))["output"]
    [call] = [item for item in output if item["type"] == "function_call"]
    assert (call["namespace"], call["name"]) == ("team.v1", "sum")
    assert json.loads(call["arguments"])["n"] in range(10)
    user, flat = {"role": "user", "content": "x"}, call | {"namespace": None, "name": "team.v1.sum"}
    requested = {"model": "echo", "max_output_tokens": 1}
    first, second = (
        client.responses.create(**requested, input=[user, each]).usage.input_tokens for each in (call, flat)
    )
    assert first == second


def test_an_answer_is_parsed_into_a_model(client):
    class Place(BaseModel):
        city: Literal["Paris", "Rome"]

    requested = ASKED | body(temperature=0.5)
    answer = client.responses.parse(**requested, text_format=Place)
    assert answer.output_parsed.city in ("Paris", "Rome")
    assert answer.output_text == answer.output[-1].content[0].text
    with client.responses.stream(**requested, text_format=Place) as events:
        for _ in events:
            pass
        assert events.get_final_response().output_parsed == answer.output_parsed


def test_a_response_repeats_what_was_asked(client):
    answer = client.responses.create(
        **ASKED | {"model": "tiny/thinker", "metadata": {"a": "b"}, "temperature": 0.5, "tools": [ADD]},
        tool_choice="none",
        store=False,
        **body(),
    )
    assert answer.model == "tiny/thinker"
    assert answer.metadata == {"a": "b"}
    assert (answer.temperature, answer.top_p, answer.tool_choice) == (0.5, 1.0, "none")
    assert answer.tools[0].to_dict() == ADD
    assert answer.id.startswith("resp_")
    assert [model.id for model in client.models.list()] == ["tiny/thinker", "echo"]


def test_logprobs_are_those_of_the_text(client):
    form = {"format": {"type": "json_schema", "name": "n", "schema": NUMBER}}
    requested = ASKED | body(top_logprobs=2) | {"text": form, "include": ["message.output_text.logprobs"]}
    whole = client.responses.create(**requested).output[-1].content[0]
    streamed = [
        entry
        for event in client.responses.create(**requested, stream=True)
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert len(streamed) > 2
    assert [entry.token for entry in whole.logprobs] == [entry.token for entry in streamed]
    assert "".join(entry.token for entry in streamed).endswith(whole.text)
    assert all(len(entry.top_logprobs) == 2 for entry in whole.logprobs)


def test_what_the_engine_refuses_has_the_names_of_these_fields(client):
    bad = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form = {"format": {"type": "json_schema", "name": "x", "schema": bad}}
    for change, param in (
        ({"text": form}, "text.format.schema"),
        ({"tools": [ADD, ADD | {"name": "f", "parameters": bad}]}, "tools.1.parameters"),
        ({"input": "x " * 3000}, "input"),
        ({"reasoning": {"effort": "none"}}, "reasoning.effort"),
        ({"input": [{"role": "user", "content": "x " * 3000}], "stream": True}, "input"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            client.responses.create(**ASKED | change)
        assert error.value.param == param, error.value


def test_tokens_are_those_of_the_bundles_tokenizer(client):
    tokenizer = tool_models.qwen3_tokenizer(tool_models.QWEN3_THINKING)
    with httpx.Client(base_url=str(client.base_url).removesuffix("/v1/"), timeout=60) as http:

        def requested(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()

        for text in ("the theme, naïve 😀", "<|im_end|>", ""):
            answer = requested("/tokenize", {"model": "echo", "prompt": text, "add_special_tokens": False})
            assert answer == {
                "count": len(answer["tokens"]),
                "max_model_len": 1200,
                "tokens": tokenizer(text, add_special_tokens=False)["input_ids"],
            }
            assert requested("/detokenize", {"model": "tiny/thinker", "tokens": answer["tokens"]}) == {"prompt": text}
        chat = requested("/tokenize", {"messages": CHAT, "tools": [CHAT_TOOL]})
        output = client.chat.completions.create(model="echo", messages=CHAT, tools=[CHAT_TOOL], max_tokens=1)
        assert chat["count"] == output.usage.prompt_tokens
        for path, body, param in (
            ("/detokenize", {"tokens": [10**6]}, "tokens"),
            ("/detokenize", {"tokens": [1] * 1201}, "tokens"),
            ("/tokenize", {"prompt": "x" * 500_000}, "prompt"),
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
        assert http.get("/ping").status_code == http.post("/ping").status_code == 200
        metrics = http.get("/metrics").text
    assert "echo_gateway_engine_metrics_up 1.0" in metrics
    assert "\necho_iterations_total{" in metrics
    assert "\nnv_" not in metrics
