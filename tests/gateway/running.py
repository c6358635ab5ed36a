"""The gateway as users meet it: uvicorn on a port of its own, or beside the real server; and what they send it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from serving.served import Served
from starlette.applications import Starlette

KEY = "sk-0123456789abcdef"  # of the servers of conftest.py


@contextmanager
def running(app: Starlette, **options: Any) -> Iterator[httpx.Client]:
    """A client of the app, for as long as the block lasts. ``options`` are uvicorn's."""
    options |= {"loop": "asyncio", "log_config": None, "access_log": False, "timeout_graceful_shutdown": 5}
    config = uvicorn.Config(app, port=0, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the gateway did not start"
            assert time.monotonic() < end, "the gateway does not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the gateway does not stop"


def refused(response, status: int, param: str | None = None) -> str:
    """The sentence of an answer that must be an error in OpenAI's format."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].endswith(".")
    return error["message"]


def client_of(server: Served) -> httpx.Client:
    """A client of a server's OpenAI API, with its key."""
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{server.openai}", headers=headers, timeout=120)


def raw(server: Served, request: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.openai), timeout=30) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def post(server: Served, path: str, body: dict[str, Any]) -> socket.socket:
    """An open connection on which the request was sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.openai), timeout=30)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def wait_for_data(connection: socket.socket) -> None:
    """Return once the first event of a stream has come."""
    received = b""
    while b"data:" not in received:
        part = connection.recv(4096)
        assert part, received
        received += part
