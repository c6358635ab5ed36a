"""What the gateway answers before the engine is asked, and while there is none: the server's address is a dead port."""

from __future__ import annotations

import json
import random
import socket
import sys
from pathlib import Path

import httpx
import pytest
from server.running import CHAT, COMPLETION, KEY, NOBODY, refused, running

from echo_trt.engine.process import client as engine_client
from echo_trt.errors import UserError
from echo_trt.server.app import create_app
from echo_trt.server.keys import Keys
from echo_trt.server.schemas import IGNORED, REFUSED, ChatRequest, CompletionRequest

OTHER_KEY = "sk-fedcba9876543210"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER_KEY}  \n")
    return file


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tools": [], "logprobs": False, "presence_penalty": 0.0, "n": None},
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}], "top_k": -1},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_absent_server_is_503_also_for_a_stream(client, stream, change):
    response = client.post("/v1/chat/completions", json=CHAT | change | {"stream": stream})
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
    names = [*CompletionRequest.model_fields, *ChatRequest.model_fields, *REFUSED, *IGNORED, "nobody knows it", ""]
    values += [[{"role": "user", "content": value}] for value in values]
    generator, seen = random.Random(0), set()
    for _ in range(400):
        path, valid = generator.choice([("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
        body = dict(valid)
        for _ in range(generator.randint(1, 3)):
            body[generator.choice(names)] = generator.choice(values)
        response = client.post(path, json=body)
        assert response.status_code in (400, 404, 503), body
        assert response.json()["error"]["message"].endswith(".")
        seen.add(response.status_code)
    assert seen >= {400, 503}


def test_a_body_of_another_type_is_400(client):
    response = client.post("/v1/completions", content=json.dumps(COMPLETION), headers={"Content-Type": "text/plain"})
    assert "JSON" in refused(response, 400)


def test_unknown_models_paths_and_methods(client):
    refused(client.post("/v1/chat/completions", json=CHAT | {"model": "gpt"}), 404, "model")
    refused(client.get("/v1/models/gpt"), 404, "model")
    refused(client.get("/v1/models/../../etc/passwd"), 404)
    refused(client.get("/docs"), 404)
    assert refused(client.get("/v1/completions"), 405) == "'/v1/completions' does not take this method; use POST."
    assert client.get("/v1/completions").headers["Allow"] == "POST"
    assert set(client.post("/health").headers["Allow"].split(", ")) == {"GET", "HEAD"}
    for path in ("/health/", "/metrics/", "/v1/completions/"):
        refused(client.get(path, headers={"Host": "evil.example"}), 404)
    assert client.get("/v1/models").json()["data"][0]["id"] == "echo"
    assert client.get("/v1/models/echo").json()["object"] == "model"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/echo", "/nowhere"])
def test_head_answers_as_get_does_without_a_body(client, path):
    got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code
    assert head.headers["Content-Type"] == got.headers["Content-Type"]
    assert head.content == b""


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


@pytest.mark.parametrize("target", [b"http://x/v1/models", b"HTTP://x:9000/v1/models?a=b"])
def test_a_target_may_be_a_whole_url(client, target):
    answer = exchange(client, b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target)
    assert answer.startswith(b"HTTP/1.1 200")
    page = exchange(client, b"GET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert page.startswith(b"HTTP/1.1 200")
    assert b"<!doctype html>" in page
    gone = exchange(client, b"GET http://x/v1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert gone.startswith(b"HTTP/1.1 404")


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


@pytest.mark.parametrize(
    "header",
    [None, "", KEY, "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer # ours"],
)
def test_without_a_right_key_nothing_but_health_and_metrics(keys_file, header):
    headers = {} if header is None else {"Authorization": header}
    with running(api_keys_file=keys_file) as client:
        for path in ("/v1/chat/completions", "/v1/completions"):
            response = client.post(path, content=b"{", headers=headers)
            refused(response, 401)
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/echo", "/nowhere", "//v1/models", "/metrics/", "/health/x"):
            refused(client.get(path, headers=headers), 401)
        assert client.get("/metrics", headers=headers).status_code == 200
        assert client.get("/health", headers=headers).status_code == 503


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer  {OTHER_KEY}"])
def test_a_right_key_is_let_in(keys_file, header):
    with running(api_keys_file=keys_file) as client:
        assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200


def test_keys_are_neither_kept_nor_logged(keys_file, caplog):
    caplog.set_level("DEBUG")
    keys = Keys(keys_file)
    with running(api_keys_file=keys_file) as client:
        for key in (KEY, KEY + "wrong"):
            client.post("/v1/completions", json=COMPLETION, headers={"Authorization": f"Bearer {key}"})
        assert KEY not in client.get("/metrics").text
    assert "the engine" in caplog.text  # the failure was logged, so the log is not empty by accident
    assert KEY not in caplog.text
    assert KEY.encode() not in repr(vars(keys)).encode()


@pytest.mark.parametrize("text", [None, "", "# only this\n", "short\n", f"{KEY} {OTHER_KEY}\n"])
def test_a_keys_file_without_a_usable_key_is_the_users_mistake(tmp_path, text):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="API keys file") as error:
        create_app(NOBODY, api_keys_file=file)
    assert KEY not in str(error.value)


def test_requests_are_counted_by_path_and_status(client):
    client.get("/secret/path")
    client.post("/v1/completions", json={})
    text = client.get("/metrics").text
    assert 'echo_gateway_requests_total{path="other",status="404"}' in text
    assert 'echo_gateway_requests_total{path="/v1/completions",status="400"}' in text
    assert "secret" not in text
    assert "echo_gateway_running 0.0" in text  # this one asks for no text
