"""Bodies that are refused by field, and those that pass to the engine, which is not there (503)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from server.running import CHAT, COMPLETION, RESPONSE, refused

from echo_trt.server.schemas import ChatRequest

TOOLS = [{"type": "function", "function": {"name": "f"}}]
NAMED = {"type": "function", "function": {"name": "f"}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CUT = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Pa'}}
USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f"}
SPACE = {"type": "namespace", "name": "space", "tools": [TOOL]}
HOSTED = [{"type": "web_search", "external_web_access": False}, {"type": "image_generation", "size": "auto"}]
ASSISTANT = {"role": "assistant", "content": None}
WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"schema": 5}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/tokenize": {},
    "/detokenize": {},
}
#: Path -> fields, and values with which they are refused.
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "/v1/chat/completions": {
        "max_tokens": (0, -2, 2**40, 1.5),
        "n": (129,),
        "seed": (2**63,),
        "stop": (["x"] * 17,),
        "stop_token_ids": ([1] * 9,),
        "stream": ("yes",),
        "logprobs": (5,),
        "top_logprobs": (3,),
        "logit_bias": ({"five": 1}, {"99999999999": 1}, {str(token): 1 for token in range(301)}),
        "messages": ([], "hello"),
        "response_format": ({"type": "xml"}, "json"),
        "structured_outputs": ({"regex": "a", "json_object": True}, {"xml": "a"}),
        "guided_json": ("{",),
        "tools": (TOOLS * 129,),
        "tool_choice": ("required",),
        "functions": ([{"name": "f"}],),
        "function_call": ("auto",),
        "chat_template_kwargs": (["enable_thinking"],),
        "reasoning_effort": ("much",),
        "thinking_token_budget": (-1,),
        "latency": (5, ["interactive"], {"tpot_ms": "fast"}),
    },
    "/v1/completions": {
        "prompt": ([], 5, [1, "a"], [[1], []], [True], [-1], [[5, 2**31]]),
        "logprobs": (21, True),
        "top_logprobs": (1,),
        "min_tokens": (17,),  # 16 is the limit where none is given
        "suffix": (5, {}),
    },
    "/v1/responses": {
        "input": (None, [], 5, [USER] * 2049, [{"type": "reasoning", "id": "r", "summary": []}]),
        "max_output_tokens": (0,),
        "store": ("x",),
        "background": (True,),
        "previous_response_id": ("resp_1",),
        "conversation": ("conv_1",),
        "truncation": ("middle",),
        "n": (2,),
        "tools": ([SPACE | {"tools": [TOOL | {"name": f"f{i}"} for i in range(128)]}, TOOL],),
        "tool_choice": ("required",),
    },
    "/tokenize": {"prompt": (5,)},
    "/detokenize": {"tokens": ("x", [-1], [True], [1] * (2**18 + 1))},
}
#: Path -> changes of its body, and the field that the refusal names.
CHANGES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "/v1/chat/completions": [
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"min_tokens": 5, "max_completion_tokens": 2}, "min_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}},
            "response_format.json_schema",
        ),
        ({"response_format": WRONG_SCHEMA}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": TOOLS * 2}, "tools.1.function.name"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"tools": TOOLS, "tool_choice": NAMED, "guided_json": {}}, "guided_json"),
        ({"repeat_penalty": 0}, "repetition_penalty"),  # llama.cpp's name of it
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"messages": [USER | {"nam": "x"}]}, "messages.0.nam"),
        ({"messages": [USER | {"images": ["x"]}]}, "messages.0.images"),
    ],
    "/v1/completions": [
        ({"prompt": ["a"] * 5, "n": 100}, "prompt"),
        ({"prompt": "a" * 100_000, "n": 11}, "n"),
    ],
    "/v1/responses": [
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input.0.type"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [USER | {"tools": ["red"]}]}, "input.0.tools"),
        ({"input": [USER | {"content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [USER, CALL | {"arguments": "["}], "instructions": "be brief"}, "input.1.arguments"),
        ({"input": [USER, CALL | {"namespace": 5}]}, "input.1.namespace"),
        ({"input": [USER, CALL, CALL | {"call_id": 5}]}, "input.2.call_id"),
        ({"input": [USER, CALL, {"type": "function_call_output", "call_id": "c"}]}, "input.2.output"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}}, "text.format.schema"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools.0.type"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tools": [TOOL, {"type": "web_search"}], "tool_choice": "required"}, "tools.1.type"),
        ({"tools": [TOOL, SPACE | {"tools": [TOOL | {"schema": {"a": 1}}]}]}, "tools.1.tools.0.schema"),
        ({"tools": [TOOL, SPACE | {"tools": [TOOL, TOOL]}]}, "tools.1.tools.1.name"),
        ({"tools": [SPACE | {"name": "a" * 128}]}, "tools.0.tools.0.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [TOOL, *HOSTED], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"store": True, "background": True}, "background"),
    ],
    "/tokenize": [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [USER]}, "prompt"),
        ({"prompt": "x", "tools": [{}]}, "tools"),
        ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "x", "return_token_strs": True}, "return_token_strs"),
    ],
    "/detokenize": [({}, "tokens")],
}
REFUSED = [(path, {name: value}, name) for path, fields in VALUES.items() for name in fields for value in fields[name]]
REFUSED += [(path, *case) for path, cases in CHANGES.items() for case in cases]
ABOUT = {"prompt_cache_retention": "24h", "request_id": "r", "prompt_cache_options": {"ttl": 5}, "user": "u"}
#: Path -> changes of its body with which it passes to the engine.
#: What "vllm bench serve" sends beside a prompt (docs/measure.md).
BENCH = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0.0}
PASSED: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [BENCH | {"max_tokens": 8, "repetition_penalty": 1.0, "logprobs": None}, {"suffix": "end"}],
    "/v1/chat/completions": [
        ABOUT,
        BENCH | {"max_completion_tokens": 8, "messages": [USER | {"content": [{"type": "text", "text": "x"}]}]},
        {"repeat_penalty": 1.1},
        {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}},
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}},
        {"tools": TOOLS, "tool_choice": "none", "guided_regex": "a"},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALLED | {"index": 0}], "parsed": None}]},
        {"messages": [{"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}]},
        {
            "messages": [
                USER,
                {"role": "tool", "content": [{"type": "text", "text": "5"}, {"type": "text", "text": "6"}]},
            ]
        },
        {"response_format": {"type": "json_object", "schema": {}}, "reasoning_effort": "none"},
        {"structured_outputs": {"json": "{}", "regex": None}, "guided_json": None},
        {"messages": [ASSISTANT | {"reasoning_content": "so"}, USER]},  # an answer of a thought alone, sent back
        {"messages": [ASSISTANT | {"tool_calls": [CUT]}, USER]},  # a call that the limit has cut, sent back
    ],
    "/v1/responses": [
        ABOUT | {"client_metadata": {"session": "s"}},
        {"store": False, "background": False, "previous_response_id": None, "truncation": "disabled"},
        {"store": True, "truncation": "auto"},  # nothing is stored: the answer says so
        {"tools": [TOOL, *HOSTED]},  # Codex sends them unasked
        {"tools": HOSTED, "tool_choice": "auto"},
        {"tools": [TOOL, *HOSTED], "tool_choice": {"type": "function", "name": "f"}},
    ],
    "/tokenize": [{"prompt": "x"}],
    "/detokenize": [{"tokens": [1]}],
}
#: Fields, a value that changes nothing, and one that would change the answer.
HARMLESS: dict[str, tuple[Any, Any]] = {
    "add_generation_prompt": (True, False),
    "continue_final_message": (False, True),
    "early_stopping": (False, True),
    "include_stop_str_in_output": (False, True),
    "length_penalty": (1, 0.5),
    "prompt_logprobs": (0, 3),
    "return_token_strs": (False, True),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "store": (True, "x"),
    "use_beam_search": (False, True),
    "verbosity": ("medium", "low"),
}


@pytest.mark.parametrize(("path", "change", "param"), REFUSED)
def test_a_request_is_refused_by_field(client, path, change, param):
    sentence = refused(client.post(path, json=BODIES[path] | change), 400, param)
    assert param.partition(".")[0] in sentence
    if path == "/v1/responses":
        assert not any(name in sentence for name in ("messages", "function.", "response_format", "completion"))


@pytest.mark.parametrize("change", [{"prompt": [1, 2]}, {"prompt": ["a", [1]]}, {"prompt": "a", "echo": True}])
def test_a_suffix_goes_with_a_text_that_is_not_echoed(client, change):
    refused(client.post("/v1/completions", json=BODIES["/v1/completions"] | {"suffix": "b"} | change), 400, "suffix")


@pytest.mark.parametrize(("path", "change"), [(path, change) for path, changes in PASSED.items() for change in changes])
def test_what_clients_send_passes_to_the_engine(client, path, change):
    refused(client.post(path, json=BODIES[path] | change), 503)


def test_vllms_fields_are_taken_or_refused_as_their_page_says(client):
    page = (Path(__file__).parents[2] / "docs/migrating.md").read_text()
    table = page.partition("| vLLM's own fields |")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE)
    rows = {said: re.findall(r"`([\w.]+)`", names) for names, said in listed}
    for name in rows["refused"]:
        sentence = refused(client.post("/v1/chat/completions", json=CHAT | {name: 1}), 400, name)
        assert sentence == f"{name} is 1, which this engine does not support; leave it out."
    assert ("others", "dropped, and named in `X-Fields-Ignored`") in listed
    for name in ("add_special_tokens", "return_token_ids", "kv_transfer_params", "vllm_xargs", "mm_processor_kwargs"):
        answer = client.post("/v1/chat/completions", json=CHAT | {name: True})
        assert answer.headers["x-fields-ignored"] == name
    assert {name.partition(".")[0] for name in rows["taken"]} <= set(ChatRequest.model_fields)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "function", "content": "4"}, "role is 'function': functions are not supported"),
        ({"role": "assistant", "content": None, "function_call": {}}, "an object of 0: functions are not supported"),
        ({"role": "user", "content": None}, "content is null: give a string, or parts"),
        (
            USER | {"content": [{"type": "text", "text": "x"}, {"type": "image_url"}]},
            "part 1 is of type 'image_url'; give",
        ),
        ({"role": "user", "content": []}, "content is a list of 0: give a string, or parts"),
        ({"role": "user"}, "content is missing."),
        (ASSISTANT | {"tool_calls": [CALLED | {"function": {"name": "f", "arguments": "{]"}}]}, "give a JSON object"),
        (ASSISTANT | {"tool_calls": [CALLED] * 129}, "a list of 129: give at most 128 calls."),
        (USER | {"tool_calls": [CALLED]}, "only the role assistant has tool_calls"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(client, message, sentence):
    response = client.post("/v1/chat/completions", json=CHAT | {"messages": [*CHAT["messages"], message]})
    assert response.status_code == 400
    assert sentence in response.json()["error"]["message"]
    assert "messages.1" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_values_that_change_nothing_pass_and_others_are_named_with_the_remedy(client, path):
    body = BODIES[path]
    refused(client.post(path, json=body | {name: free for name, (free, _) in HARMLESS.items()}), 503)
    for name, (_, other) in HARMLESS.items():
        sentence = refused(client.post(path, json=body | {name: other}), 400, name)
        assert sentence.startswith(f"{name} is ")
        assert sentence.endswith("leave it out.")
    misspelt = refused(client.post(path, json=body | {"temprature": 1}), 400, "temprature")
    assert misspelt.endswith("did you mean temperature?")
    for same in ({"best_of": 1}, {"best_of": 3, "n": 3}, {"best_of": None, "n": 2}, {"best_of": 1, "n": None}):
        refused(client.post(path, json=body | same), 503)
    for other in ({"best_of": 3}, {"best_of": 3, "n": 2}, {"best_of": 2, "n": 3}, {"best_of": True}, {"best_of": [1]}):
        assert "value of n" in refused(client.post(path, json=body | other), 400, "best_of")


def test_a_refused_hosted_tool_is_named_with_the_setting_of_codex(client):
    for tool, setting in zip(HOSTED, ('web_search = "disabled"', "features.image_generation = false"), strict=True):
        requested = {"tools": [TOOL, tool], "tool_choice": "required"}
        assert setting in refused(client.post("/v1/responses", json=RESPONSE | requested), 400, "tools.1.type")
