"""What clients of other servers send: values that change nothing pass, others are named. There is no engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway.running import refused, running

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
RESPONSE = {"model": "echo", "input": "hello"}
#: Fields, a value that changes nothing, and one that would change the answer.
HARMLESS: dict[str, tuple[Any, Any]] = {
    "add_generation_prompt": (True, False),
    "cache_prompt": (True, False),
    "continue_final_message": (False, True),
    "early_stopping": (False, True),
    "include_stop_str_in_output": (False, True),
    "length_penalty": (1, 0.5),
    "prompt_logprobs": (0, 3),
    "return_token_ids": (False, True),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "store": (True, "x"),
    "use_beam_search": (False, True),
    "verbosity": ("medium", "low"),
}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running() as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_values_that_change_nothing_pass_and_others_are_refused(client, path):
    body = CHAT if "chat" in path else {"model": "echo", "prompt": "x"}
    refused(client.post(path, json=body | {name: free for name, (free, _) in HARMLESS.items()}), 503)
    for name, (_, other) in HARMLESS.items():
        sentence = refused(client.post(path, json=body | {name: other}), 400, name)
        assert sentence.startswith(f"{name} is ")
        assert sentence.endswith("which this engine does not support; leave it out.")


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"model": "echo", "prompt": "x"})]
)
def test_a_field_that_is_not_known_is_named_with_the_remedy(client, path, body):
    sentence = refused(client.post(path, json=body | {"temprature": 1}), 400, "temprature")
    assert sentence == "temprature is not known here; leave it out."
    message = {"role": "user", "content": "hello", "x": 1}
    said = refused(client.post("/v1/chat/completions", json=CHAT | {"messages": [message]}), 400, "messages.0.x")
    assert said == "messages.0.x is not known here; leave it out."


def test_llama_cpp_s_name_of_the_repetition_penalty(client):
    refused(client.post("/v1/chat/completions", json=CHAT | {"repeat_penalty": 1.1}), 503)
    refused(client.post("/v1/chat/completions", json=CHAT | {"repeat_penalty": 0}), 400, "repetition_penalty")
    both = CHAT | {"repeat_penalty": 1.1, "repetition_penalty": 1.2}
    assert "both given" in refused(client.post("/v1/chat/completions", json=both), 400, "repeat_penalty")


def test_fields_about_the_caller_are_ignored(client):
    about = {"prompt_cache_retention": "24h", "request_id": "r", "prompt_cache_options": {"ttl": 5}, "user": "u"}
    refused(client.post("/v1/chat/completions", json=CHAT | about), 503)
    refused(client.post("/v1/responses", json=RESPONSE | about | {"client_metadata": {"session": "s"}}), 503)
    assert "client_metadata is not known" in refused(
        client.post("/v1/chat/completions", json=CHAT | {"client_metadata": {}}), 400, "client_metadata"
    )


def test_responses_that_clients_store_or_let_be_cut_are_answered(client):
    """Nothing is stored and nothing is cut off: the answer says ``store: false``, and what does not fit is refused."""
    refused(client.post("/v1/responses", json=RESPONSE | {"store": True, "truncation": "auto"}), 503)
    for needs_storage in ({"previous_response_id": "resp_1"}, {"conversation": "c"}, {"background": True}):
        [name] = needs_storage
        sentence = refused(client.post("/v1/responses", json=RESPONSE | {"store": True} | needs_storage), 400, name)
        assert sentence.endswith("leave it out.")


def test_hosted_tools_pass_where_no_call_is_asked_for(client):
    """Codex sends them unasked. A refusal names its setting."""
    hosted = [{"type": "web_search", "external_web_access": False}, {"type": "image_generation", "size": "auto"}]
    tools = [{"type": "function", "name": "f"}, *hosted]
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": {"type": "function", "name": "f"}}):
        refused(client.post("/v1/responses", json=RESPONSE | {"tools": tools} | choice), 503)
    refused(client.post("/v1/responses", json=RESPONSE | {"tools": hosted, "tool_choice": "auto"}), 503)
    for index, setting in enumerate(('web_search = "disabled"', "features.image_generation = false")):
        asked = {"tools": [tools[0], hosted[index]], "tool_choice": "required"}
        assert setting in refused(client.post("/v1/responses", json=RESPONSE | asked), 400, "tools.1.type")
    chosen = {"tools": tools, "tool_choice": {"type": "web_search"}}
    refused(client.post("/v1/responses", json=RESPONSE | chosen), 400, "tool_choice")


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/api/chat", "/v1/messages", "/health/", "/nowhere\u2028" + "x" * 500]
)
def test_a_path_that_is_none_is_named_with_those_that_are(client, path):
    sentence = refused(client.get(path), 404)
    assert path[:20].split("\u2028")[0] in sentence
    assert len(sentence) < 400
    for known in ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/metrics"):
        assert f"{known}, " in sentence or sentence.endswith(f"{known}.")
    assert "ollama" not in sentence.lower()


def test_a_method_that_a_path_does_not_take(client):
    assert refused(client.get("/v1/responses"), 405) == "'/v1/responses' does not take this method; use POST."
