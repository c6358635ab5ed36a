"""What is looked at before the application: hosts, origins, keys, and requests that are refused while they come."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from server.running import KEY, NOBODY, refused, running

from echo_trt.server.edge import AuthMiddleware
from echo_trt.server.keys import Keys
from echo_trt.server.metrics import ServerMetrics
from echo_trt.server.options import ApiOptions

PAGE = "https://page.example"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n")
    return file


LOCAL = (
    "localhost",
    "LOCALHOST:9000",
    "a.localhost:1",
    "127.0.0.1:9000",
    "127.1.2.3",
    "[::1]",
    "[::1]:9000",
    "llm.example",
)


def test_a_server_of_this_machine_takes_its_own_names_and_origins_alone():
    with running(hosts=["LLM.example"], origins=[PAGE]) as client:

        def answer(host: str, origin: str = "") -> httpx.Response:
            headers = {"Host": host} | ({"Origin": origin} if origin else {})
            return client.post("/v1/completions", json={}, headers=headers)

        for host in LOCAL:
            refused(answer(host), 400, "prompt")
        for host in (
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::2]",
            "10.0.0.1",
            "evillocalhost",
        ):
            assert "--allowed-hosts" in refused(answer(host), 403)
            assert "--allowed-hosts" in refused(answer(host, f"http://{host}"), 403)
        for origin in ("http://localhost:9000", PAGE, "vscode-webview://a"):
            refused(answer("localhost:9000", origin), 400, "prompt")
        for origin in ("http://evil.example", "http://localhost:3000", "null"):
            assert "--allowed-origins" in refused(answer("localhost:9000", origin), 403)
        assert client.get("/metrics", headers={"Host": "evil.example"}).status_code == 403
    with running(hosts=["*"], origins=["*"]) as anyone:
        answer = anyone.get("/version", headers={"Host": "evil.example", "Origin": "http://evil.example"})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ({}, ()),
        ({"host": "::1"}, ()),
        ({"host": "0.0.0.0"}, None),
        ({"api_keys": NOBODY}, None),
        ({"api_keys": NOBODY, "allowed_hosts": ("a",)}, ("a",)),
    ],
)
def test_hosts_are_checked_on_loopback_without_keys_and_where_they_are_named(options, hosts):
    assert ApiOptions(**options).hosts == hosts


def test_any_number_of_scrapes_cost_as_much_as_one():
    asked: list[int] = []

    async def engine() -> str:
        asked.append(1)
        return "theirs"

    async def scraped() -> list[str]:
        metrics = ServerMetrics()
        return await asyncio.gather(*(metrics.scrape(engine) for _ in range(50)))

    assert all(text.endswith("theirs") for text in asyncio.run(scraped()))
    assert len(asked) == 1


@pytest.mark.parametrize("framing", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
def test_an_answer_before_its_request_is_whole_is_the_connection_s_last(keys_file, framing):
    """Much of the rest is read, so that a client which writes on sees its answer, but not all of it."""
    with running(api_keys_file=keys_file) as client, socket.socket() as connection:
        connection.settimeout(60)
        connection.connect(("127.0.0.1", client.base_url.port))
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(1000):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 401")
        assert b"connection: close\r\n" in received


def test_a_refused_request_that_came_whole_keeps_its_connection(keys_file):
    whole = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    with running(api_keys_file=keys_file) as client:
        port = client.base_url.port
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            for _ in range(2):
                connection.sendall(whole)
                received = b""
                while not received.endswith(b"}}"):
                    received += connection.recv(65536) or pytest.fail(f"the connection ended: {received!r}")
                assert received.startswith(b"HTTP/1.1 401")
                assert b"connection: close" not in received


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_start_warns_of_a_keys_file_that_every_user_may_read(keys_file, mode, caplog):
    keys_file.chmod(mode)
    Keys(keys_file)
    assert ("can be read by every user" in caplog.text) == (mode == 0o644)


def test_the_class_of_a_request_is_that_of_its_right_key(keys_file):
    keys_file.write_text(f"{KEY} latency=a\n")
    seen: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["key"] and scope["key"].latency)

    edge = AuthMiddleware(app, Keys(keys_file), 1000, ServerMetrics())
    for headers in ({b"authorization": b"Bearer wrong", b"x-api-key": KEY.encode()}, {}):
        scope = {"type": "http", "path": "/version", "headers": headers.items()}
        asyncio.run(edge(scope, None, None))  # type: ignore[arg-type]
    assert seen == ["a", None]
