"""Bodies that are refused by field, and those that pass to the engine, which is not there (503)."""

from __future__ import annotations

from typing import Any

import pytest
from server.running import CHAT, COMPLETION, RESPONSE, refused

TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = {"type": "function", "function": {"name": "f"}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f"}
SPACE = {"type": "namespace", "name": "space", "tools": [TOOL]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/tokenize": {},
    "/detokenize": {},
}
#: Path -> changes of its body, and the field that the refusal names.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/chat/completions": [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"min_tokens": 5, "max_completion_tokens": 2}, "min_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_p": 1.1}, "min_p"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"top_k": -2}, "top_k"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
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
    "/v1/completions": [
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[5, 2**31]]}, "prompt"),
        ({"prompt": ["a"] * 5, "n": 100}, "prompt"),
        ({"prompt": "a" * 100_000, "n": 11}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"min_tokens": 17}, "min_tokens"),  # 16 is the limit where none is given
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
    ],
    "/v1/responses": [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [USER] * 2049}, "input"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input.0.type"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [USER | {"colour": "red"}]}, "input.0.colour"),
        ({"input": [USER | {"content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [USER, CALL | {"arguments": "["}], "instructions": "be brief"}, "input.1.arguments"),
        ({"input": [USER, CALL, CALL | {"call_id": 5}]}, "input.2.call_id"),
        ({"input": [USER, CALL, {"type": "function_call_output", "call_id": "c"}]}, "input.2.output"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"store": "x"}, "store"),
        ({"background": True}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"truncation": "middle"}, "truncation"),
        ({"n": 2}, "n"),
        ({"shared": {}}, "shared"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}}, "text.format.schema"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools.0.type"),
        ({"tools": [TOOL, {"type": "web_search"}], "tool_choice": "required"}, "tools.1.type"),
        ({"tools": ["f"]}, "tools.0"),
        ({"tools": [TOOL, SPACE | {"tools": [TOOL | {"x": 1}]}]}, "tools.1.tools.0.x"),
        ({"tools": [TOOL, SPACE | {"tools": [TOOL, TOOL]}]}, "tools.1.tools.1.name"),
        ({"tools": [SPACE | {"name": "a" * 128}]}, "tools.0.tools.0.name"),
        ({"tools": [SPACE | {"tools": [TOOL | {"name": f"f{i}"} for i in range(128)]}, TOOL]}, "tools"),
        ({"input": [USER, CALL | {"namespace": 5}]}, "input.1.namespace"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
    "/tokenize": [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [USER]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "tools": [{}]}, "tools"),
        ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "x", "return_token_strs": True}, "return_token_strs"),
    ],
    "/detokenize": [
        ({}, "tokens"),
        ({"tokens": "x"}, "tokens"),
        ({"tokens": [-1]}, "tokens"),
        ({"tokens": [True]}, "tokens"),
        ({"tokens": [1] * (2**18 + 1)}, "tokens"),
    ],
}
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


@pytest.mark.parametrize(
    ("path", "change", "param"), [(path, *case) for path, cases in REFUSED.items() for case in cases]
)
def test_a_request_is_refused_by_field(client, path, change, param):
    sentence = refused(client.post(path, json=BODIES[path] | change), 400, param)
    assert param.partition(".")[0] in sentence
    if path == "/v1/responses":
        assert not any(name in sentence for name in ("messages", "function.", "response_format", "completion"))


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "function", "content": "4"}, "role is 'function': functions are not supported by this engine"),
        ({"role": "assistant", "content": None, "function_call": {}}, "an object of 0: functions are not supported"),
        ({"role": "user", "content": None}, "content is null: give a string, or parts of type text."),
        ({"role": "user", "content": []}, "content is a list of 0: give a string, or parts of type text."),
        ({"role": "user"}, "content is missing."),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALLED | {"function": {"name": "f", "arguments": "{"}}],
            },
            "arguments is '{': give a JSON object, written as a string.",
        ),
        ({"role": "user", "content": "x", "tool_calls": [CALLED]}, "only the role assistant has tool_calls"),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALLED] * 129},
            "a list of 129: give at most 128 calls.",
        ),
    ],
)
def test_what_is_wrong_with_a_message_is_said(client, message, sentence):
    response = client.post("/v1/chat/completions", json=CHAT | {"messages": [*CHAT["messages"], message]})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert "messages.1" in response.json()["error"]["message"]


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
    output = refused(client.post("/v1/chat/completions", json=CHAT | {"messages": [message]}), 400, "messages.0.x")
    assert output == "messages.0.x is not known here; leave it out."


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
        requested = {"tools": [tools[0], hosted[index]], "tool_choice": "required"}
        assert setting in refused(client.post("/v1/responses", json=RESPONSE | requested), 400, "tools.1.type")
    chosen = {"tools": tools, "tool_choice": {"type": "web_search"}}
    refused(client.post("/v1/responses", json=RESPONSE | chosen), 400, "tool_choice")


@pytest.mark.parametrize(
    "change",
    [
        {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": "none", "guided_regex": "a"},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALLED | {"index": 0}], "parsed": None}]},
        {"response_format": {"type": "json_object", "schema": {}}, "reasoning_effort": "none"},
        {"structured_outputs": {"json": "{}", "regex": None}, "guided_json": None},
        {"messages": [*CHAT["messages"], {"role": "tool", "content": [{"type": "text", "text": "5"}]}]},
    ],
)
def test_what_clients_send_passes_to_the_engine(client, change):
    refused(client.post("/v1/chat/completions", json=CHAT | change), 503)


def test_a_response_that_asks_for_nothing_special_goes_to_the_engine(client):
    free = {"store": False, "background": False, "previous_response_id": None, "truncation": "disabled", "user": "u"}
    refused(client.post("/v1/responses", json=RESPONSE | free), 503)
    refused(client.post("/v1/responses", json=RESPONSE | {"model": "gpt"}), 404, "model")


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_best_of_is_n_or_refused(client, path, body):
    for same in ({"best_of": 1}, {"best_of": 3, "n": 3}, {"best_of": None, "n": 2}, {"best_of": 1, "n": None}):
        refused(client.post(path, json=body | same), 503)
    for other in ({"best_of": 3}, {"best_of": 3, "n": 2}, {"best_of": 2, "n": 3}, {"best_of": True}, {"best_of": [1]}):
        assert "value of n" in refused(client.post(path, json=body | other), 400, "best_of")


def test_tokens_are_the_engines(client):
    refused(client.post("/tokenize", json={"prompt": "x"}), 503)
    refused(client.post("/detokenize", json={"tokens": [1]}), 503)
    refused(client.post("/tokenize", json={"model": "gpt", "prompt": "x"}), 404, "model")


def test_what_a_client_sends_back_of_an_answer_is_accepted(client):
    earlier = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    refused(client.post("/v1/chat/completions", json=CHAT | {"messages": [earlier, parts], "user": "u"}), 503)
