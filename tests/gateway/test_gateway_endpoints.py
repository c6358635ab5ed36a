"""Names, versions, origins and figures of the gateway, and its schema; the server's address is a dead port."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest
from gateway.running import running
from gateway.test_gateway_refusals import CHAT, COMPLETION, KEY, NOBODY, refused
from starlette.routing import Route

from echo_trt import __version__
from echo_trt.errors import UserError
from echo_trt.gateway.app import create_app

PAGE = "https://page.example"
RESPONSE = {"model": "echo", "input": "hello"}
USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
TOOL = {"type": "function", "name": "f"}
SPACE = {"type": "namespace", "name": "space", "tools": [TOOL]}
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running() as client:
        yield client


@pytest.fixture
def keys_file(tmp_path):
    (tmp_path / "keys").write_text(KEY)
    return tmp_path / "keys"


@pytest.mark.parametrize(
    ("change", "param"),
    [
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
)
def test_a_response_is_refused_by_the_name_of_its_own_field(client, change, param):
    sentence = refused(client.post("/v1/responses", json=RESPONSE | change), 400, param)
    assert param.rpartition(".")[2] in sentence
    for name in ("messages", "function.", "response_format", "completion"):
        assert name not in sentence


def test_a_response_that_asks_for_nothing_special_goes_to_the_engine(client):
    free = {"store": False, "background": False, "previous_response_id": None, "truncation": "disabled", "user": "u"}
    refused(client.post("/v1/responses", json=RESPONSE | free), 503)
    refused(client.post("/v1/responses", json=RESPONSE | {"model": "gpt"}), 404, "model")


def test_the_model_has_all_its_names(tmp_path):
    with running(names=["a/b", "c", "a/b"]) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["a/b", "c"]
        assert client.get("/v1/models/a/b").json()["id"] == "a/b"
        refused(client.get("/v1/models/echo"), 404, "model")
        for name in ("a/b", "c"):
            refused(client.post("/v1/completions", json=COMPLETION | {"model": name}), 503)
        assert "'a/b' or 'c'" in refused(client.post("/v1/completions", json=COMPLETION), 404, "model")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": [""]}, "--served-model-name"),
        ({"names": ["a b"]}, "--served-model-name"),
        ({"names": ["x" * 300]}, "--served-model-name"),
        ({"origins": ["page.example"]}, "--allowed-origins"),
        ({"origins": ["https://page.example/"]}, "--allowed-origins"),
    ],
)
def test_odd_options_are_the_users_mistake(options, said):
    with pytest.raises(UserError, match=said):
        create_app(NOBODY, **options)


def test_version_and_ping_need_no_key(keys_file):
    with running(api_keys_file=keys_file) as client:
        assert client.get("/version").json() == {"version": __version__}
        for answer in (client.get("/ping"), client.post("/ping"), client.get("/health")):
            refused(answer, 503)  # as there is no engine
        for path in ("/tokenize", "/detokenize", "/v1/responses"):
            refused(client.post(path, json={}), 401)


def test_pages_of_allowed_origins_may_ask(keys_file):
    with running(api_keys_file=keys_file, origins=[PAGE]) as client:
        allowed = client.options("/v1/chat/completions", headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["Access-Control-Allow-Origin"] == PAGE
        assert allowed.headers["Access-Control-Allow-Headers"] == "authorization"
        assert "POST" in allowed.headers["Access-Control-Allow-Methods"]
        other = client.options("/v1/chat/completions", headers=PREFLIGHT | {"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in other.headers
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"Origin": PAGE})
        refused(answer, 401)
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        assert client.get("/version", headers={"Origin": PAGE}).headers["Access-Control-Allow-Origin"] == PAGE
        assert "Access-Control-Allow-Origin" not in client.get("/version", headers={"Origin": "null"}).headers
    with running(origins=["*"]) as client:
        assert client.get("/version", headers={"Origin": PAGE}).headers["Access-Control-Allow-Origin"] == "*"


def test_without_the_option_no_page_may_ask(client):
    refused(client.options("/v1/chat/completions", headers=PREFLIGHT), 405)
    assert "Access-Control-Allow-Origin" not in client.get("/version", headers={"Origin": PAGE}).headers


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_best_of_is_n_or_refused(client, path, body):
    for same in ({"best_of": 1}, {"best_of": 3, "n": 3}, {"best_of": None, "n": 2}, {"best_of": 1, "n": None}):
        refused(client.post(path, json=body | same), 503)
    for other in ({"best_of": 3}, {"best_of": 3, "n": 2}, {"best_of": 2, "n": 3}, {"best_of": True}, {"best_of": [1]}):
        assert "value of n" in refused(client.post(path, json=body | other), 400, "best_of")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": [{}]}, "tools"),
        ("/tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [1] * (2**18 + 1)}, "tokens"),
    ],
)
def test_questions_for_tokens_are_refused_by_field(client, path, body, param):
    refused(client.post(path, json=body), 400, param)


def test_tokens_are_the_engines(client):
    refused(client.post("/tokenize", json={"prompt": "x"}), 503)
    refused(client.post("/detokenize", json={"tokens": [1]}), 503)
    refused(client.post("/tokenize", json={"model": "gpt", "prompt": "x"}), 404, "model")


def test_the_schema_has_every_path_and_its_references_resolve(client):
    document = client.get("/openapi.json").json()
    assert document["info"]["version"] == __version__
    app = create_app(NOBODY)
    methods = {
        (r.path.replace(":path", ""), method.lower())
        for r in app.routes
        if isinstance(r, Route) and r.include_in_schema  # the page's files are no API
        for method in r.methods
    }
    told = {(path, method) for path, item in document["paths"].items() for method in item if method != "parameters"}
    assert told == {(path, method) for path, method in methods if method != "head"}
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for reference in {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in schemas
    assert "shared" not in schemas["ResponsesRequest"]["properties"]
    assert {"temperature", "input", "stop"} <= schemas["ResponsesRequest"]["properties"].keys()
    assert len(text) < 40_000


def test_metrics_come_without_the_engines_where_it_is_away(client):
    assert "echo_gateway_engine_metrics_up 0.0" in client.get("/metrics").text
