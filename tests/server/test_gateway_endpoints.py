"""Names, versions, origins and figures of the gateway, and its schema; the server's address is a dead port."""

from __future__ import annotations

import json

import pytest
from server.running import CHAT, COMPLETION, KEY, NOBODY, refused, running
from starlette.routing import Route

from echo_trt import __version__
from echo_trt.errors import UserError
from echo_trt.server.app import create_app

PAGE = "https://page.example"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


@pytest.fixture
def keys_file(tmp_path):
    (tmp_path / "keys").write_text(KEY)
    return tmp_path / "keys"


def test_the_model_has_all_its_names(tmp_path):
    with running(names=["a/b", "c", "a/b"]) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["a/b", "c"]
        assert client.get("/v1/models/a/b").json()["id"] == "a/b"
        refused(client.get("/v1/models/echo"), 404, "model")
        for name in ("a/b", "c"):
            refused(client.post("/v1/completions", json=COMPLETION | {"model": name}), 503)
        assert "'a/b' or 'c'" in refused(client.post("/v1/completions", json=COMPLETION), 404, "model")


@pytest.mark.parametrize(
    ("options", "output"),
    [
        ({"names": [""]}, "--served-model-name"),
        ({"names": ["a b"]}, "--served-model-name"),
        ({"names": ["x" * 300]}, "--served-model-name"),
        ({"origins": ["page.example"]}, "--allowed-origins"),
        ({"origins": ["https://page.example/"]}, "--allowed-origins"),
    ],
)
def test_odd_options_are_the_users_mistake(options, output):
    with pytest.raises(UserError, match=output):
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
    reported = {(path, method) for path, item in document["paths"].items() for method in item if method != "parameters"}
    assert reported == {(path, method) for path, method in methods if method != "head"}
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for reference in {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in schemas
    assert "shared" not in schemas["ResponsesRequest"]["properties"]
    assert {"temperature", "input", "stop"} <= schemas["ResponsesRequest"]["properties"].keys()
    assert len(text) < 40_000


def test_metrics_come_without_the_engines_where_it_is_away(client):
    assert "echo_gateway_engine_metrics_up 0.0" in client.get("/metrics").text


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
