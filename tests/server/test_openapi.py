"""The document at /openapi.json: real answers fit it, other people's types agree with it, a client made of it chats."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter
from server.running import asked_at
from tool_models import CLOSED_NUMBER as NUMBER

from echo_trt.server import answer_types
from echo_trt.server.anthropic import types as anthropic_types
from echo_trt.server.openapi import EXAMPLES
from echo_trt.server.responses import types as responses_types

FUNCTION = {"name": "add", "description": "a sum", "parameters": NUMBER}
TOOLS = [{"type": "function", "function": FUNCTION}]
CHAT = {"messages": [{"role": "user", "content": "the theme"}], "seed": 3, "thinking_token_budget": 5}
SHORT = CHAT | {"model": "echo", "max_tokens": 12}
OLLAMA = {"model": "echo", "options": {"seed": 3, "num_predict": 12}}
#: The path, and a body that each of its kinds of answers comes to.
ANSWERED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", SHORT),
    ("/v1/chat/completions", SHORT | {"logprobs": True, "top_logprobs": 2, "token_sources": True, "n": 2}),
    ("/v1/chat/completions", CHAT | {"model": "echo", "tools": TOOLS, "tool_choice": "required"}),
    ("/v1/completions", {"model": "echo", "prompt": "a", "max_tokens": 5}),
    ("/v1/completions", {"model": "echo", "prompt": ["a", "b"], "logprobs": 1, "echo": True, "token_sources": True}),
    ("/v1/responses", {"model": "echo", "input": "a", "seed": 3, "thinking_token_budget": 5, "max_output_tokens": 12}),
    ("/v1/responses", {"model": "echo", "input": "a", "include": ["message.output_text.logprobs"]}),
    (
        "/v1/responses",
        {"model": "echo", "input": "a", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"},
    ),
    ("/v1/messages", SHORT),
    (
        "/v1/messages",
        CHAT
        | {"model": "echo", "max_tokens": 400, "tool_choice": {"type": "any"}}
        | {"tools": [{"name": "add", "input_schema": NUMBER}]},
    ),
    ("/api/chat", OLLAMA | {"messages": CHAT["messages"]}),
    ("/api/chat", {"model": "echo", "messages": []}),
    ("/api/generate", OLLAMA | {"prompt": "a"}),
]
PLAIN: list[tuple[str, dict[str, Any] | None]] = [
    *((path, None) for path in ("/v1/models", "/v1/models/echo", "/api/tags", "/api/version", "/health", "/ping")),
    *((path, None) for path in ("/version", "/live/about")),
    ("/api/show", {"model": "echo"}),
    ("/tokenize", {"prompt": "a"}),
    ("/detokenize", {"tokens": [5]}),
    ("/detokenize", {"tokens": []}),
    ("/v1/messages/count_tokens", {"model": "echo", "messages": CHAT["messages"]}),
]


@pytest.fixture(scope="module")
def door(tool_bundle) -> Iterator[httpx.Client]:
    with asked_at(tool_bundle("thinking")) as door:
        yield door


@pytest.fixture(scope="module")
def document(door) -> dict[str, Any]:
    return door.get("/openapi.json").json()


def fits(document: dict[str, Any], path: str, status: str, media: str, answer: Any) -> None:
    """Compare an answer with what the document says of a path's; fields that it does not name are refused."""
    [operation, *_] = [each for name, each in document["paths"][path].items() if name in ("post", "get")]
    schema = operation["responses"][status]["content"][media]["schema"]
    kinds = {
        name: kind | ({"additionalProperties": False} if "properties" in kind else {})
        for name, kind in document["components"]["schemas"].items()
    }
    Draft202012Validator(schema | {"components": {"schemas": kinds}}).validate(answer)


@pytest.mark.parametrize(("path", "body"), ANSWERED)
def test_answers_and_their_parts_are_as_the_document_says(path, body, door, document):
    answer = door.post(path, json=body | {"stream": False})
    assert answer.status_code == 200, answer.text
    fits(document, path, "200", "application/json", answer.json())
    usage = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    more = usage if path in ("/v1/chat/completions", "/v1/completions") else {}
    streamed = door.post(path, json=body | more | {"stream": True})
    assert streamed.status_code == 200, streamed.text
    media = streamed.headers["content-type"].partition(";")[0]
    lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith(("data: {", "{"))]
    assert lines
    for line in lines:
        fits(document, path, "200", media, json.loads(line))


@pytest.mark.parametrize(("path", "body"), PLAIN)
def test_other_answers_are_as_the_document_says(path, body, door, document):
    answer = door.get(path) if body is None else door.post(path, json=body)
    assert answer.status_code == 200, answer.text
    path = "/v1/models/{name}" if path == "/v1/models/echo" else path
    fits(document, path, "200", "application/json", answer.json())


@pytest.mark.parametrize("path", EXAMPLES)
def test_examples_are_answered_also_next_to_fields_of_null_and_unknown_ones(path, door, document):
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    example, schema = body["example"], body["schema"] | {"components": document["components"]}
    assert door.post(path, json=example).status_code == 200
    valid, name = Draft202012Validator(schema), body["schema"]["$ref"].rpartition("/")[2]
    more = {field: None for field in document["components"]["schemas"][name]["properties"] if field not in example}
    taken = example | {field: None for field in more if valid.is_valid(example | {field: None})} | {"ttl": 5}
    assert len(taken) > len(example) + 1
    assert valid.is_valid(taken)
    assert (answer := door.post(path, json=taken)).status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("/v1/chat/completions", {"top_p": -0.1}),
        ("/v1/messages", {"messages": [{"role": "user"}]}),
        ("/v1/messages", {"messages": [{"role": "tool", "content": "x"}]}),
        ("/tokenize", {"prompt": None, "messages": [{"role": "user", "content": 5}]}),
        ("/api/show", {"model": {}}),
    ],
)
def test_what_the_document_rules_out_is_refused(path, wrong, door, document):
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    schema = Draft202012Validator(body["schema"] | {"components": document["components"]})
    assert not schema.is_valid(body["example"] | wrong)
    assert door.post(path, json=body["example"] | wrong).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat", "/tokenize"])
def test_refusals_are_as_the_document_says_of_their_api(path, door, document):
    refused = door.post(path, json={"model": 5})
    assert refused.status_code == 400
    fits(document, path, "default", "application/json", refused.json())


@pytest.mark.parametrize(
    ("path", "library", "name", "ours"),
    [
        ("/v1/chat/completions", "openai.types.chat", "ChatCompletion", answer_types.ChatCompletion),
        ("/v1/chat/completions", "openai.types.chat", "ChatCompletionChunk", answer_types.ChatCompletionChunk),
        ("/v1/completions", "openai.types", "Completion", answer_types.TextCompletion),
        ("/v1/responses", "openai.types.responses", "Response", responses_types.ResponseObject),
        ("/v1/responses", "openai.types.responses", "ResponseStreamEvent", responses_types.StreamedEvent),
        ("/v1/messages", "anthropic.types", "Message", anthropic_types.AnthropicMessage),
        ("/v1/messages", "anthropic.types", "RawMessageStreamEvent", anthropic_types.MessageEvent),
    ],
)
def test_other_people_s_types_take_every_answer(path, library, name, ours, door):
    """By the clients' types, which clients themselves do not hold answers against.

    But for echoed prompts, whose first token has null for its log-probability, as OpenAI's API had it.
    """
    theirs = TypeAdapter(getattr(pytest.importorskip(library, reason="needs the client"), name))
    own, whole = TypeAdapter(ours), name in ("ChatCompletion", "Completion", "Response", "Message")
    for body in (body for each, body in ANSWERED if each == path and "echo" not in body):
        answer = door.post(path, json=body | {"stream": not whole})
        lines = [answer.text] if whole else [line[6:] for line in answer.text.splitlines() if line[:7] == "data: {"]
        for line in lines:
            theirs.validate_json(line)
            own.validate_json(line, strict=True)


def test_a_client_that_is_made_of_the_document_chats(door, document, tmp_path, monkeypatch):
    pytest.importorskip("openapi_python_client", reason="needs openapi-python-client")
    (tmp_path / "document.json").write_text(json.dumps(document))
    words = ["generate", "--path", tmp_path / "document.json", "--meta", "none", "--output-path", tmp_path / "made"]
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")
    words += ["--config", tmp_path / "config.yaml", "--fail-on-warning"]
    done = subprocess.run([sys.executable, "-m", "openapi_python_client", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    client = importlib.import_module("made").AuthenticatedClient(str(door.base_url), token="any", timeout=120)

    def ask(operation: str, model: str, body: dict[str, Any]) -> Any:
        kind = getattr(importlib.import_module("made.models"), model)
        return importlib.import_module(f"made.api.{operation}").sync(client=client, body=kind.from_dict(body))

    chat = ask("open_ai.create_chat_completion", "ChatRequest", SHORT)
    wanted = door.post("/v1/chat/completions", json=SHORT).json()
    [choice] = chat.choices
    assert choice.message.content == wanted["choices"][0]["message"]["content"]
    assert (choice.finish_reason, chat.usage.completion_tokens) == ("length", 12)
    message = ask("anthropic.create_message", "MessagesRequest", SHORT)
    assert [block.type_ for block in message.content] == ["thinking", "text"]
    assert message.usage.output_tokens == 12
    refused = ask("ollama.ollama_show", "ShowRequest", {"model": "other"})
    assert "does not exist" in refused.error
    models = importlib.import_module("made.api.open_ai.list_models").sync(client=client)
    assert models.data[0].id == "echo"
