"""What the gateway answers before the engine is asked, and while there is none: the server's address is a dead port."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from pathlib import Path

import httpx
import pytest
from server.running import CHAT, COMPLETION, KEY, NOBODY, RESPONSE, refused, running
from starlette.routing import Route

from echo_trt import __version__
from echo_trt.engine.process import client as engine_client
from echo_trt.errors import UserError
from echo_trt.files.log import LineFormatter
from echo_trt.server.anthropic.blocks import READ
from echo_trt.server.anthropic.request import CountTokensRequest, MessagesRequest
from echo_trt.server.app import create_app
from echo_trt.server.fields import ABOUT, UNSUPPORTED
from echo_trt.server.keys import Keys
from echo_trt.server.ollama.request import GenerateRequest, OllamaChatRequest
from echo_trt.server.responses.request import ResponsesRequest
from echo_trt.server.schemas import ChatRequest, CompletionRequest

#: Path -> a body that passes, and the model that reads it.
KINDS = {
    "/v1/completions": (COMPLETION, CompletionRequest),
    "/v1/chat/completions": (CHAT, ChatRequest),
    "/v1/responses": (RESPONSE, ResponsesRequest),
    "/v1/messages": (CHAT | {"max_tokens": 5}, MessagesRequest),
    "/v1/messages/count_tokens": (CHAT, CountTokensRequest),
    "/api/chat": (CHAT, OllamaChatRequest),
    "/api/generate": (COMPLETION, GenerateRequest),
}
BLOCKS = [
    {},
    {"text": "x", "id": 5, "name": [], "input": {"a": []}, "tool_use_id": "t", "content": [{"type": "image"}]},
]
OTHER_KEY = "sk-fedcba9876543210"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER_KEY}  \n")
    return file


@pytest.mark.parametrize("stream", [False, True])
def test_an_absent_server_is_503_also_for_a_stream(client, stream):
    response = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    refused(response, 503)
    assert int(response.headers["Retry-After"]) > 0
    refused(client.get("/health"), 503)


def test_an_engine_that_does_not_answer_is_ill_and_one_that_is_back_is_found_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_client, "WAIT_S", 0.2)
    with running(tmp_path / "engine") as client:
        refused(client.get("/health"), 503)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(tmp_path / "engine"))
            silent.listen()
            refused(client.get("/health"), 503)
            requested, _ = silent.accept()
            with requested:
                assert requested.recv(1000)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"",
        b"\xff\xfe",
        b'{"model": "echo", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "echo", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "echo", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "echo", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "echo", "stop": "\\udfff", "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 100_000,
        b'{"model": "echo", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_400(client, body):
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert len(response.json()["error"]["message"]) < 400


def test_no_nonsense_makes_the_gateway_fail(client):
    """Fields left out and put in, with values of every type: refused, or sent on to the server that is not there."""
    numbers = [0, -1, 1, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308]
    values = [*numbers, None, True, "", "x", "\x00", "é" * 5000, [], [[]], [None], {}, {"a": [1]}, [1, 2], ["a", 1]]
    values += [[{"role": role, "content": value}] for value in values for role in ("user", "assistant")]
    values += [[{"role": "user", "content": [{"type": kind} | block]}] for kind in READ for block in BLOCKS]
    values += [[block | {"function": block}] for block in BLOCKS] + [{"type": value} for value in values[:23]]
    generator, seen = random.Random(0), set()
    for _ in range(1000):
        path, (valid, kind) = generator.choice(list(KINDS.items()))
        names = [*kind.known(), *UNSUPPORTED, *ABOUT, "nobody knows it", ""]
        body = dict(valid)
        for _ in range(generator.randint(1, 3)):
            body[generator.choice(names)] = generator.choice(values)
        response = client.post(path, json=body)
        assert response.status_code in (200 if "/api" in path else 400, 400, 404, 503), body
        assert response.status_code == 200 or sentence_of(response).endswith(".")
        seen.add((path, response.status_code))
    assert seen >= {(path, status) for path in KINDS for status in (400, 503)}


def test_a_body_of_another_type_is_400(client):
    response = client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert "JSON" in refused(response, 400)


def test_unknown_models_paths_and_methods(client):
    refused(client.post("/v1/chat/completions", json=CHAT | {"model": "gpt"}), 404, "model")
    refused(client.get("/v1/models/gpt"), 404, "model")
    for path in ("/v1/models/../../etc/passwd", "/docs", "/health/", "/metrics/", "/v1/completions/"):
        refused(client.get(path, headers={"Host": "evil.example"}), 404)
    assert refused(client.get("/v1/completions"), 405).endswith("use POST.")
    assert client.get("/v1/completions").headers["Allow"] == "POST"
    assert set(client.post("/health").headers["Allow"].split(", ")) == {"GET", "HEAD"}
    for path in ("/v1/embedding", "/nowhere\u2028" + "x" * 500):
        sentence = refused(client.get(path), 404)
        assert path[:20].split("\u2028")[0] in sentence
        assert len(sentence) < 500
        known = {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/metrics"}
        assert known <= set(sentence.rstrip(".").replace(",", " ").split())


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/v1/embeddings", "run a server of an embedding model"),
        ("/v1/moderations", "run a server of a guard model"),
        ("/v1/files", "keep messages, files and jobs at the client"),
        ("/v1/responses/resp_1", "keep messages, files and jobs at the client"),
        ("/api/pull", "use echo-trt build and echo-trt serve"),
    ],
)
def test_what_is_not_served_is_named_with_what_to_run(client, path, remedy):
    answer = client.post(path, json={"model": "echo", "input": "x"})
    assert answer.status_code == 404
    sentence = sentence_of(answer)
    assert path in sentence
    assert remedy in sentence


def sentence_of(answer: httpx.Response) -> str:
    """Return the sentence of an error, in the form of the API that the path belongs to."""
    error, path = answer.json()["error"], answer.request.url.path
    if path.startswith("/api/"):
        return error
    names = "message type" if path.startswith("/v1/messages") else "message type param code"
    assert set(error) == set(names.split())
    return error["message"]


def test_an_answer_has_the_request_s_id_or_one_of_its_own(client):
    for path in ("/v1/models", "/nowhere", "/v1/messages"):
        for given in ("req-17", "x" * 128):
            answer = client.get(path, headers={"X-Request-Id": given})
            assert answer.headers["X-Request-Id"] == answer.headers["Request-Id"] == given
        for given in ("x" * 129, "a b", ""):
            own = client.get(path, headers={"X-Request-Id": given}).headers["X-Request-Id"]
            assert own.startswith("req_")
            assert own != client.get(path).headers["X-Request-Id"]


def exchange(client: httpx.Client, request: bytes) -> bytes:
    """All that comes back on a connection on which ``request`` was sent."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    "names",
    [(b"Content-Length: 16", b"Transfer-Encoding: chunked"), (b"transfer-encoding: chunked", b"content-length: 16")],
)
def test_a_body_of_two_lengths_is_refused_and_ends_the_connection(client, names):
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"\r\n".join([b"POST /v1/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json", *names])
    answer = exchange(client, head + b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n" + smuggled)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"Transfer-Encoding; send one." in answer


def test_no_request_names_a_file_that_is_opened(client):
    """Python tells of every file that it opens, folder that it lists and program that it starts."""
    field, seen = "/nowhere/at-all", []

    def note(event: str, args: tuple) -> None:
        if event.split(".")[0] in ("open", "os", "shutil", "subprocess", "import") and field in str(args):
            seen.append(event)

    sys.addaudithook(note)
    for path in (field, f"../..{field}", f"file://{field}", f"@{field}", f"{{{{ cycler('{field}') }}}}"):
        chat = CHAT | {"messages": [{"role": "user", "content": path}]}
        for body in (chat, CHAT | {"model": path}, CHAT | {"stop": path}, CHAT | {"user": path}, CHAT | {path: path}):
            client.post("/v1/chat/completions", json=body)
        client.post("/v1/completions", json=COMPLETION | {"prompt": path})
        client.get(f"/v1/models/{path}")
        client.get(path, headers={"Referer": path, "X-File": path})
    assert not seen
    with pytest.raises(OSError, match="No such file"):
        Path(field).read_bytes()
    assert seen == ["open"]


def test_large_bodies_are_refused_announced_or_not():
    with running(largest_body=1000) as client:
        long = json.dumps(COMPLETION | {"prompt": "x" * 1000}).encode()
        headers = {"Content-Type": "application/json"}
        assert "1000" in refused(client.post("/v1/completions", content=long, headers=headers), 413)
        chunks = (long[i : i + 100] for i in range(0, len(long), 100))  # without a Content-Length
        assert "1000" in refused(client.post("/v1/completions", content=chunks, headers=headers), 413)
        refused(client.post("/v1/completions", json=COMPLETION), 503)


def test_without_a_right_key_nothing_but_health_and_metrics(keys_file):
    wrong = (None, "", KEY, "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer # ours")
    with running(api_keys_file=keys_file) as client:
        for header in wrong:
            headers = {} if header is None else {"Authorization": header}
            for path in ("/v1/chat/completions", "/v1/completions"):
                response = client.post(path, content=b"{", headers=headers)
                refused(response, 401)
                assert response.headers["WWW-Authenticate"] == "Bearer"
            for path in ("/v1/models", "/v1/models/echo", "/nowhere", "//v1/models", "/metrics/", "/health/x"):
                refused(client.get(path, headers=headers), 401)
            for path in ("/metrics", "/version"):
                assert client.get(path, headers=headers).status_code == 200
            for path in ("/health", "/ping"):
                assert client.get(path, headers=headers).status_code == 503
        for header in (f"Bearer {KEY}", f"bearer  {OTHER_KEY}"):
            assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200
        assert client.get("/v1/models", headers={"X-Api-Key": KEY}).status_code == 200  # as Anthropic's clients send it
        assert client.get("/v1/models", headers={"X-Api-Key": KEY + "x"}).status_code == 401
        answer = client.post("/v1/messages", content=b"{")
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
        assert "API key" in client.get("/api/tags").json()["error"]


def test_keys_are_neither_kept_nor_logged_and_prompts_not_logged(keys_file, caplog):
    caplog.set_level("DEBUG")
    caplog.handler.setFormatter(LineFormatter("test", "json"))
    keys = Keys(keys_file)
    with running(api_keys_file=keys_file) as client:
        for key in (KEY, KEY + "wrong"):
            body = COMPLETION | {"prompt": "a private question"}
            for wrong in ({}, {"n": "a private question"}, {"a b": "private"}):
                client.post("/v1/completions", json=body | wrong, headers={"Authorization": f"Bearer {key}"})
        assert KEY not in client.get("/metrics").text
    assert "the engine is away" in caplog.text  # the failure was logged, so the log is not empty by accident
    assert KEY not in caplog.text
    assert "private" not in caplog.text
    assert KEY.encode() not in repr(vars(keys)).encode()


def test_a_keys_file_that_changes_is_read_again(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text(KEY)

    def replaced(text: str) -> None:
        new = tmp_path / "new"
        new.write_text(text)
        os.utime(new, ns=(0, file.stat().st_mtime_ns))  # as a copy that keeps times
        new.replace(file)

    with running(api_keys_file=file, classes=["a"]) as client:

        def statuses() -> list[int]:
            headers = ({"Authorization": f"Bearer {key}"} for key in (KEY, OTHER_KEY))
            return [client.get("/v1/models", headers=each).status_code for each in headers]

        assert statuses() == [200, 401]
        for text, allowed in ((f"{KEY}\n{OTHER_KEY}", [200, 200]), ("short", [200, 200]), (OTHER_KEY, [401, 200])):
            replaced(text)
            assert statuses() == allowed
        with file.open("a") as lines:
            lines.write(f"\n{KEY}\n")
        assert statuses() == [200, 200]
        replaced(f"{KEY}\n{OTHER_KEY} latency=a\n")
        assert statuses() == [200, 200]
        for line in (b" latency=unknown", b" latency=\xff"):
            file.write_bytes(OTHER_KEY.encode() + line)
            assert statuses() == [200, 200]
        file.unlink()
        assert statuses() == [200, 200]
        file.write_text("# nobody\n")
        assert statuses() == [401, 401]
        replaced(OTHER_KEY)
        assert statuses() == [401, 200]
        file.write_text("")
        os.utime(file)  # just now: it may be being written
        assert statuses() == [401, 200]
        os.utime(file, (0, 0))
        assert statuses() == [401, 401]
    assert caplog.text.count("the API keys stay as they were: API keys file") == 4
    for number, times in ((2, 3), (1, 2), (0, 2)):
        assert caplog.text.count(f"{file} has changed; keys that it holds: {number}") == times


@pytest.mark.parametrize("text", [None, "", "# only this\n", "short\n", f"{KEY} {OTHER_KEY}\n"])
def test_a_keys_file_without_a_usable_key_is_the_users_mistake(tmp_path, text):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="API keys file") as error:
        create_app(NOBODY, api_keys_file=file)
    assert KEY not in str(error.value)


# -- names, versions, origins, and the schema -------------------------------------------------------------------------


PAGE = "https://page.example"
PREFLIGHT = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


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
        ({"names": ["a b"]}, "--served-model-name"),
        ({"names": ["x" * 300]}, "--served-model-name"),
        ({"origins": ["https://page.example/"]}, "--allowed-origins"),
        ({"hosts": ["page.example:80"]}, "--allowed-hosts"),
    ],
)
def test_odd_options_are_the_users_mistake(options, output):
    with pytest.raises(UserError, match=output):
        create_app(NOBODY, **options)


def test_pages_of_allowed_origins_alone_may_ask(keys_file, client):
    def allowed(answer: httpx.Response) -> str | None:
        return answer.headers.get("Access-Control-Allow-Origin")

    path = "/v1/chat/completions"
    with running(api_keys_file=keys_file, origins=[PAGE]) as one:
        preflight = one.options(path, headers=PREFLIGHT)
        assert (preflight.status_code, allowed(preflight)) == (200, PAGE)
        assert preflight.headers["Access-Control-Allow-Headers"] == "authorization"
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert allowed(one.options(path, headers=PREFLIGHT | {"Origin": "https://evil.example"})) is None
        answer = one.post(path, json=CHAT, headers={"Origin": PAGE})
        refused(answer, 401)
        assert allowed(answer) == PAGE
        assert allowed(one.get("/version", headers={"Origin": "null"})) is None
    with running(origins=["*"]) as anyone:
        assert allowed(anyone.get("/version", headers={"Origin": PAGE})) == "*"
    refused(client.options(path, headers=PREFLIGHT), 405)
    assert allowed(client.get("/version", headers={"Origin": PAGE})) is None


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


def test_metrics_come_without_the_engines_where_it_is_away(client):
    """Requests are counted by path and status, and paths that are none as one."""
    client.get("/secret/path")
    text = client.get("/metrics").text
    assert "echo_gateway_engine_metrics_up 0.0" in text
    assert 'echo_gateway_requests_total{path="other",status="404"}' in text
    assert "secret" not in text
