"""What the log says of requests: read from real servers, or from a door and an engine of this process."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from engine.service.served import Served, free_ports
from files.test_log import BEGINS, HOSTILE
from server.running import CHAT, COMPLETION, KEY, NOBODY, RESPONSE, asked_at, client_of, is_up, running
from waiting import wait_until

from echo_trt.engine.process import host
from echo_trt.files.log import LineFormatter
from echo_trt.server import app, request_log
from echo_trt.server.request_log import DISTINCT

SERVE = "--log-format", "json", "--no-page"
APIS = {
    "/v1/chat/completions": CHAT | {"max_tokens": 6, "ignore_eos": True},
    "/v1/completions": COMPLETION | {"max_tokens": 6, "ignore_eos": True},
    "/v1/responses": RESPONSE | {"max_output_tokens": 6, "ignore_eos": True},
    "/v1/messages": CHAT | {"max_tokens": 6, "ignore_eos": True},
    "/api/chat": CHAT | {"stream": False, "options": {"num_predict": 6}, "ignore_eos": True},
    "/api/generate": COMPLETION | {"stream": False, "options": {"num_predict": 6}, "ignore_eos": True},
}
LONG = {"max_tokens": 1400, "ignore_eos": True}


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in text.splitlines()]


def lines_with(server: Served, **fields: Any) -> list[dict[str, Any]]:
    """Wait for lines of a running server that have these fields."""
    whole = lambda: lines_of(server.err[: server.err.rfind("\n") + 1])  # noqa: E731
    fits = lambda: [each for each in whole() if fields.items() <= each.items()]  # noqa: E731
    return wait_until(fits, 60, lambda: server.err)


@pytest.fixture
def said(caplog) -> Callable[[], list[dict[str, Any]]]:
    """Return the lines of this process."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.WARNING, "httpx")
    caplog.handler.setFormatter(LineFormatter("test", "json"))
    return lambda: lines_of(caplog.text)


# -- a real server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "stream"), [(path, number % 2 == 0) for number, path in enumerate(APIS)])
def test_a_finished_request_has_one_line(server, path, stream):
    id = f"{path}-{stream}"
    with client_of(server) as client:
        body = APIS[path] | {"stream": stream, "ttl": 300}
        answer = client.post(path, json=body, headers={"X-Request-Id": id})
    assert answer.status_code == 200, answer.text
    [found] = lines_with(server, request_id=id)
    assert (found["level"], found["process"], found["message"]) == ("INFO", "server", "request finished")
    assert (found["method"], found["path"], found["status"], found["key"]) == ("POST", path, 200, 1)
    assert (found["model"], found["finish_reason"], found["completion_tokens"]) == ("echo", "length", 6)
    assert found["prompt_tokens"] > found["cached_tokens"] >= 0
    assert found["ignored"] == answer.headers["x-fields-ignored"] == "ttl"
    assert 0 <= found["queue_ms"] <= found["first_token_ms"] <= found["total_ms"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_is_told(server, stream):
    body = json.dumps(CHAT | LONG | {"stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-Id: left-{stream}"
    )
    with socket.create_connection(("127.0.0.1", server.openai), timeout=60) as connection:
        rest = f"\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + rest).encode() + body)
        if stream:
            assert connection.recv(10)
        else:
            server.wait_metrics(lambda metrics: metrics["echo_running"] > 0)
    [found] = lines_with(server, request_id=f"left-{stream}")
    assert (found["level"], found["message"], found["status"]) == ("INFO", "request cancelled", 499)
    assert found["finish_reason"] == "cancelled"
    assert found.get("completion_tokens", 0) < 1400


def test_a_refusal_has_a_line_wherever_it_is_made(server):
    url, own = f"http://127.0.0.1:{server.openai}", {"User-Agent": "a client/1", "X-Request-Id": "refused"}
    large = b"x" * 2**21
    with client_of(server) as client:
        chat = CHAT | {"messages": "a private question", "user": "b"}
        assert client.post("/v1/chat/completions", json=chat, headers=own).status_code == 400
        assert client.get("/nowhere", headers=own).status_code == 404
        assert client.post("/v1/completions", content=large, headers=own).status_code == 413
        assert httpx.get(f"{url}/v1/models", headers=own).status_code == 401
    with socket.create_connection(("127.0.0.1", server.openai), timeout=60) as connection:
        connection.sendall(b"NO HTTP\r\n\r\n")
        assert b"400" in connection.recv(100)
    [malformed] = lines_with(server, error="Invalid HTTP request received.")
    assert (malformed["level"], malformed["status"]) == ("WARNING", 400)
    wait_until(lambda: len(lines_with(server, request_id="refused")) == 4)
    found = {each["status"]: each for each in lines_with(server, request_id="refused")}
    assert found.keys() == {400, 401, 404, 413}
    assert {each["message"] for each in found.values()} == {"request refused"}
    assert {each["user_agent"] for each in found.values()} == {"a client/1"}
    assert (found[400]["field"], found[400]["error"]) == ("messages", "messages is ...: input should be a valid list.")
    assert [found[status].get("key") for status in (400, 401, 404, 413)] == [1, None, 1, 1]
    assert "private" not in server.err


def test_nothing_of_a_client_makes_a_line(server):
    with client_of(server) as client:
        path = "/" + "".join(f"%{byte:02x}" for byte in HOSTILE.encode())
        for header in ("X-Request-Id", "User-Agent"):
            with pytest.raises(httpx.LocalProtocolError):  # no client sends it; what one can send is below
                client.get(path, headers={header: "a\nb"})
            client.get(
                path, headers={header: HOSTILE.replace("\n", "\x7f").replace("\r", "").encode("latin-1", "replace")}
            )
        raw = f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\n2026-01-01T00:00:00.000Z ERROR serve: forged\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.openai), timeout=60) as connection:
            connection.sendall(raw.encode())
            assert connection.recv(100)
        assert client.get("/behind it").status_code == 404
    lines_with(server, path="/behind it")
    assert "forged" in server.err
    assert not [each for each in server.err.splitlines() if not each.startswith('{"time": ')]
    assert "forged" not in {each["message"] for each in lines_of(server.err)}


def test_probes_have_no_line(server):
    with client_of(server) as client:
        for path in ("/health", "/ping", "/metrics", "/version"):
            assert client.get(path, headers={"X-Request-Id": "probe"}).status_code == 200
        assert client.get("/v1/models", headers={"X-Request-Id": "behind-probes"}).status_code == 200
    [found] = lines_with(server, request_id="behind-probes")
    assert (found["path"], found["status"]) == ("/v1/models", 200)
    assert not [each for each in lines_of(server.err) if each.get("request_id") == "probe"]


def test_an_engine_that_dies_is_a_line_of_each_process(server):
    """The last test of the server: a stream that has begun ends with an error, whose line is none of success."""
    request = client_of(server).build_request(
        "POST", "/v1/chat/completions", json=CHAT | LONG | {"stream": True}, headers={"X-Request-Id": "lost"}
    )
    [engine] = [
        each for each in psutil.Process(server.process.pid).children() if "echo_trt.engine.process" in each.cmdline()
    ]
    with client_of(server) as client:
        answer = client.send(request, stream=True)
        assert answer.status_code == 200
        pieces = answer.iter_bytes()
        next(pieces)
        os.kill(engine.pid, signal.SIGKILL)
        assert b"not available" in b"".join(pieces)
    [found] = lines_with(server, request_id="lost")
    assert (found["level"], found["message"], found["status"]) == ("ERROR", "request failed", 503)
    assert found["reason"] == "away: the engine is away."
    [died] = lines_with(server, process="serve", level="ERROR")
    assert died["message"].startswith("the engine has died (signal 9, Killed); starting it again")
    pools = [each for each in lines_with(server, process="engine") if "KV pool" in each["message"]]
    assert all(each["message"].startswith("KV pool: ") for each in pools)


# -- a door without an engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--no-request-log",)])
def test_a_door_by_itself_writes_the_same_form(options, tmp_path):
    [port] = free_ports(1)
    words = [sys.executable, "-m", "echo_trt.server", "--engine-socket", NOBODY, "--port", str(port), *options]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(words, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_until(lambda: is_up(client))
                id = client.post("/v1/completions", json=COMPLETION).headers["X-Request-Id"]
        finally:
            process.terminate()
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(BEGINS, each) for each in lines), lines
    [failed] = [each for each in lines if id in each]
    assert " ERROR server: request failed " in failed
    assert ' path=/v1/completions status=503 error="The engine is not available; retry in a few seconds." ' in failed
    assert any("path=/v1/models" in each for each in lines) == (not options)


def test_equal_lines_are_one_and_many_kinds_are_few(said, monkeypatch):
    monkeypatch.setattr(request_log, "EVERY_S", 1)
    with running() as client:
        for _ in range(20):
            assert client.post("/v1/completions", json=COMPLETION).status_code == 503
        wait_until(lambda: sum(each.get("more", 0) for each in said()) == 19)
        assert len([each for each in said() if each.get("path") == "/v1/completions"]) < 20
    before = len(said())
    monkeypatch.setattr(request_log, "EVERY_S", 60)
    with running() as client:
        for number in range(3 * DISTINCT):
            client.get(f"/{number}")
    several = said()[before:]  # what was counted is written where the door ends
    assert len(several) == DISTINCT + 1
    assert several[-1]["message"].startswith(f"... {2 * DISTINCT} more of other kinds in ")
    assert "request_id" not in several[-1]


def test_probes_of_an_engine_that_is_away_have_one_line(said, monkeypatch):
    monkeypatch.setattr(request_log, "EVERY_S", 0)  # equal lines are not joined
    with running() as client:
        for _ in range(4):
            assert client.get("/health").status_code == 503
            assert client.get("/metrics").status_code == 200
    [line] = [each for each in said() if each.get("path") == "/health"]
    assert (line["status"], line["reason"]) == (503, "away: the engine is away.")


def test_an_unexpected_failure_has_the_id_of_its_answer(said, monkeypatch, bundle_of):
    def fail(*_: object) -> None:
        raise RuntimeError("a flaw")

    with asked_at(bundle_of("close")) as client:
        monkeypatch.setattr(app, "chat_for", fail)
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "The API server failed at this request; its log says why."
        monkeypatch.undo()
        monkeypatch.setattr(host.OpenAnswer, "take", fail)
        later = client.post("/v1/chat/completions", json=CHAT)
        assert later.status_code == 500
        monkeypatch.undo()
    for failed, trace in ((answer, "at a request"), (later, "an answer could not be sent")):
        lines = [each for each in said() if each.get("request_id") == failed.headers["X-Request-Id"]]
        [cause] = [each for each in lines if trace in each["message"]]
        assert "RuntimeError: a flaw" in cause["traceback"]
        [line] = [each for each in lines if each["message"] == "request failed"]
        assert (line["path"], line["status"]) == ("/v1/chat/completions", 500)
