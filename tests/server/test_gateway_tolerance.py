"""The rule for fields that are not known: dropped and named, or refused where the text may depend on them."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator

import httpx
import pytest
from server.running import CHAT, COMPLETION, RESPONSE, refused, running

USER = {"role": "user", "content": "x"}
MESSAGES = {"model": "echo", "max_tokens": 4, "messages": [USER]}
OLLAMA = {"model": "echo", "messages": [USER]}
GENERATE = {"model": "echo", "prompt": "x"}
TOOL = {"type": "function", "function": {"name": "f", "x_origin": "here"}}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/responses/input_tokens": RESPONSE,
    "/v1/messages": MESSAGES,
    "/api/chat": OLLAMA,
    "/api/generate": GENERATE,
}
ALL = tuple(BODIES)
CHATS, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
#: Paths, fields, and what the header names.
DROPPED = [
    (ALL, {"ttl": 300, "draft_model": "x", "provider": {"order": ["x"]}}, "ttl, draft_model, provider"),
    (ALL, {"user": "u", "metadata": {}, "service_tier": "auto", "anything": None}, ""),
    ((CHATS, COMPLETIONS), {"id_slot": -1, "cache_prompt": False, "separate_reasoning": True}, None),
    ((CHATS, COMPLETIONS), {"dry_multiplier": 0, "dry_base": 1.75, "mirostat": 0, "mirostat_tau": 5}, None),
    ((CHATS, COMPLETIONS), {"max_tokens": -1}, "max_tokens"),
    ((CHATS, COMPLETIONS), {"stop": ""}, "stop"),
    ((CHATS, COMPLETIONS), {"guided_decoding_backend": "guidance", "max_tokens": 2.0, "n_predict": 2}, ""),
    ((CHATS,), {"max_tokens": 2, "max_completion_tokens": 2}, ""),
    ((CHATS, RESPONSES), {"tools": [], "tool_choice": "auto"}, "tool_choice"),
    ((CHATS, RESPONSES), {"stream": False, "stream_options": {"include_obfuscation": False}}, "stream_options"),
    ((CHATS,), {"messages": [USER | {"id": "1"}, USER | {"id": "2"}]}, "messages.id"),
    ((CHATS, "/api/chat"), {"tools": [TOOL]}, "tools.function.x_origin"),
    ((CHATS,), {"response_format": {"type": "json_object", "value": {"type": "object"}}}, ""),
    ((CHATS,), {"response_format": {"type": "text", "hint": "x"}}, ""),
    ((CHATS,), {"guided_json": '{"type": "object"}', "structured_outputs": {"json": {"type": "object"}}}, ""),
    ((CHATS,), {"enable_thinking": False, "reasoning": {"effort": "low"}, "thinking": {"type": "disabled"}}, ""),
    ((RESPONSES,), {"max_output_tokens": -1, "reasoning": {"summary": "detailed"}}, "max_output_tokens"),
    ((RESPONSES,), {"input": [USER | {"colour": "red"}]}, "input.colour"),
    (("/v1/messages",), {"thinking": {"type": "adaptive", "display": "updates"}}, ""),
    (("/v1/messages",), {"messages": [USER | {"colour": "red"}]}, "messages.colour"),
    (("/api/chat", "/api/generate"), {"options": {"num_ctx": 64, "num_predict": -1}}, "options.num_ctx"),
    (("/api/chat", "/api/generate"), {"options": {"typical_p": 1.0, "top_p": 0}}, "options.typical_p"),
    (("/api/generate",), {"raw": False, "suffix": "", "context": [], "logprobs": True, "top_logprobs": 2}, None),
]
#: Paths, fields, the field that the sentence names, and what it says.
REFUSED = [
    (ALL, {"temprature": 0}, "temprature", "; did you mean temperature?"),
    ((CHATS, COMPLETIONS), {"topP": 0.5}, "topP", "; did you mean top_p?"),
    ((CHATS, COMPLETIONS), {"max_token": 5}, "max_token", "; did you mean max_tokens?"),
    ((CHATS,), {"messages": [USER | {"nam": "x"}]}, "messages.0.nam", "; did you mean name?"),
    ((CHATS,), {"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "_usage?"),
    (("/api/chat",), {"options": {"temprature": 1}}, "options.temprature", "; did you mean temperature?"),
    (ALL, {"logits_processors": ["x"]}, "logits_processors", "a list of 1, which this engine does not support"),
    (ALL, {"mirostat": 2}, "mirostat", "is 2, which this engine does not support"),
    (ALL, {"images": ["x"]}, "images", "a list of 1, which"),
    ((CHATS, COMPLETIONS), {"samplers": ["top_k"]}, "samplers", "a list of 1, which"),
    ((COMPLETIONS,), {"top_logprobs": 1}, "top_logprobs", "; did you mean logprobs?"),
    ((CHATS,), {"system": "be brief"}, "system", "is 'be brief', which"),
    ((CHATS,), {"messages": [USER | {"attachments": ["x"]}]}, "messages.0.attachments", "a list of 1, which"),
    ((CHATS,), {"guided_json": {}, "structured_outputs": {"json": {"a": 1}}}, "guided_json", "give one of them"),
]


def _cases(table: list) -> Iterator:
    for paths, *rest in table:
        yield from ((path, *rest) for path in paths)


@pytest.fixture(scope="module")
def strict() -> Iterator[httpx.Client]:
    with running(strict_fields=True) as client:
        yield client


@pytest.mark.parametrize(("path", "fields", "named"), _cases(DROPPED))
def test_a_field_that_changes_no_text_is_dropped_and_named(client, path, fields, named):
    answer = client.post(path, json=BODIES[path] | fields)
    assert answer.status_code == 503, answer.text  # it passed to the engine, which is not there
    expected = ", ".join(fields) if named is None else named
    assert answer.headers.get("x-fields-ignored", "") == expected


@pytest.mark.parametrize(("path", "fields", "name", "said"), _cases(REFUSED))
def test_a_typing_error_and_a_field_that_changes_texts_are_refused(client, path, fields, name, said):
    answer = client.post(path, json=BODIES[path] | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    sentence = error if isinstance(error, str) else error["message"]
    assert sentence.startswith(f"{name} ") or "both given" in sentence
    assert said in sentence


@pytest.mark.parametrize("path", ALL)
def test_strict_fields_refuse_what_is_not_known(strict, path):
    answer = strict.post(path, json=BODIES[path] | {"ttl": 300})
    assert answer.status_code == 400
    assert "ttl is not known here; leave it out." in answer.text
    known = {"user": "u", "skip_special_tokens": True, "store": True}
    assert strict.post(path, json=BODIES[path] | known).status_code == 503
    if path in (CHATS, COMPLETIONS):
        refused(strict.post(path, json=BODIES[path] | {"max_tokens": -1}), 400, "max_tokens")


@pytest.mark.parametrize("path", ALL)
def test_a_missing_model_is_the_model_and_another_is_not_here(client, path):
    body = {name: value for name, value in BODIES[path].items() if name != "model"}
    for more in ({}, {"model": ""}, {"model": None}):
        assert client.post(path, json=body | more).status_code == 503
    answer = client.post(path, json=body | {"model": "ecco"})
    assert answer.status_code == 404
    assert "The model 'ecco' does not exist here (did you mean 'echo'?); ask for 'echo'." in answer.text


def test_a_model_of_any_name_takes_all():
    with running(names=("*", "a", "b")) as client:
        assert client.post("/v1/chat/completions", json=CHAT | {"model": "tgi"}).status_code == 503
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["a", "b"]
        assert client.get("/v1/models/tgi").json()["id"] == "tgi"
    with running(names=("*",)) as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["echo"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/octet-stream", None])
def test_ollamas_paths_take_any_type_but_from_web_pages(client, kind):
    headers = {"content-type": kind} if kind else {}
    for path in ("/api/chat", "/api/generate"):
        body = json.dumps(BODIES[path]).encode()
        assert client.post(path, content=body, headers=headers).status_code == 503
        assert client.post(path, content=body, headers=headers | {"origin": "http://page"}).status_code == 400
    assert client.post("/v1/completions", content=json.dumps(COMPLETION).encode(), headers=headers).status_code == 400


def test_a_compressed_body_is_refused_as_such(client):
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    answer = client.post("/v1/completions", content=gzip.compress(json.dumps(COMPLETION).encode()), headers=headers)
    assert refused(answer, 400).startswith("Content-Encoding is 'gzip'; send the body as it is")


def test_many_names_and_odd_ones_cost_little_and_break_no_header(client):
    odd = client.post(CHATS, json=CHAT | {"a\r\nx-evil: 1": 1, "é\u2028": 1})
    assert odd.headers["x-fields-ignored"] == r"a\r\nx-evil: 1, \xe9\u2028"
    assert client.post(CHATS, json=CHAT | {" a": 1, "": 1}).headers["x-fields-ignored"] == "a,"
    turns = [USER | {f"z{turn}q{number}": 1 for number in range(90)} for turn in range(700)]
    begin = time.process_time()
    answer = client.post(CHATS, json=CHAT | {"messages": turns})
    assert "more than 100 fields that are not known here" in refused(answer, 400)
    assert time.process_time() - begin < 5  # 63,000 names, of which a hundred are looked at


def test_paths_of_ollamas_heartbeat_and_of_slashes(client):
    with running(page=False) as bare:
        assert bare.head("/").status_code == 200
        assert bare.get("/").text == "Ollama is running"
    assert "doctype html" in client.get("/").text
    [loaded] = client.get("/api/ps").json()["models"]
    assert loaded.keys() >= {"name", "model", "digest", "size", "size_vram", "expires_at", "details"}
    sentence = refused(client.post("/v1/chat/completions/", json=CHAT), 404)
    assert sentence.endswith("there is no slash at its end; use /v1/chat/completions.")
    assert "compacted" in refused(client.post("/v1/responses/compact", json=RESPONSE), 404)
