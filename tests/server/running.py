"""The door as users meet it: on a port, before an engine of this process or before none; and what they send it."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from engine.service.served import Served, free_ports
from starlette.applications import Starlette
from waiting import listens, wait_until

from echo_trt.server.__main__ import server_of
from echo_trt.server.app import create_app

KEY = "sk-0123456789abcdef"  # of the servers of conftest.py
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"model": "echo", "prompt": "hello"}
RESPONSE = {"model": "echo", "input": "hello"}
NOBODY = Path("/nowhere/engine")  # a socket that nobody listens on


class Door(Served):
    """A door and its engine in threads of this process, on a port of its own, as an httpx.Client and Served know it."""

    def __init__(self, engine: Path | Starlette, server: dict[str, Any] | None = None, **options: Any):
        """``engine``: its socket, or another application. ``server``: options of uvicorn; others: of ``create_app``."""
        self.engine, [self.openai] = engine, free_ports(1)
        self._metrics = self.openai
        given = {"host": "127.0.0.1", "port": self.openai, "timeout_graceful_shutdown": 5, **(server or {})}
        app = engine if isinstance(engine, Starlette) else create_app(engine, **options)
        self._server = server_of(app, **given)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started, "the door did not start"

    def kill(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the door does not stop"


@contextmanager
def running(engine: Path | Starlette = NOBODY, **options: Any) -> Iterator[httpx.Client]:
    """Return a client of a door, for as long as the block lasts; ``options`` are Door's."""
    door = Door(engine, **options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{door.openai}", timeout=120) as client:
            yield client
    finally:
        door.kill()


@contextmanager
def alone(**popen: Any) -> Iterator[tuple[httpx.Client, psutil.Popen]]:
    """Return a client of a door without an engine in a process of its own, and the process; ``popen`` are its
    options.
    """
    [port] = free_ports(1)
    words = [sys.executable, "-m", "echo_trt.server", "--engine-socket", NOBODY, "--port", str(port)]
    process = psutil.Popen(words, **popen)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until(lambda: is_up(client) or process.poll() is not None)
            yield client, process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()


def is_up(client: httpx.Client) -> bool:
    """Whether a new connection is answered."""
    try:
        return httpx.get(client.base_url.join("/v1/models"), timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def engine_of(
    bundle: Path, queue: int = 256, classes: str = "", keeps_latency: bool = False, **options: Any
) -> Iterator[Path]:
    """Return the socket of an engine in this process; ``options`` are of ``LLM``."""
    from echo_trt.engine.latency import LatencyClasses
    from echo_trt.engine.llm import LLM
    from echo_trt.engine.process.host import Host
    from echo_trt.engine.service.metrics import EngineMetrics
    from echo_trt.engine.service.service import Service

    llm = LLM(bundle, **options)
    service = Service(llm, queue, keeps_latency)
    host = Host(service, bundle, EngineMetrics("echo"), LatencyClasses(classes))
    folder = Path(tempfile.mkdtemp())  # pytest's own are too long for a socket
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(host.serve(folder / "engine", stop),), daemon=True)
    thread.start()
    try:
        wait_until(lambda: listens(folder / "engine") or not thread.is_alive())
        yield folder / "engine"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        service.close(0)
        shutil.rmtree(folder)
        assert not thread.is_alive(), "the engine's host does not stop"


@contextmanager
def asked_at(bundle: Path, **options: Any) -> Iterator[httpx.Client]:
    """Return a client of a bundle's engine and door in this process."""
    with engine_of(bundle) as engine, running(engine, **options) as door:
        yield door


@contextmanager
def asked_by_openai(bundle: Path, **options: Any) -> Iterator[Any]:
    """OpenAI's client of a bundle's engine and door in this process."""
    from openai import OpenAI

    with asked_at(bundle, **options) as door:
        yield OpenAI(base_url=f"{door.base_url}/v1", api_key="any", max_retries=0, timeout=300)


def refused(response, status: int, param: str | None = None) -> str:
    """Return the sentence of an answer that must be an error in OpenAI's format."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].endswith((".", "?"))
    return error["message"]


def client_of(server: Served) -> httpx.Client:
    """Return a client of a server's OpenAI API, with its key."""
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=f"http://127.0.0.1:{server.openai}", headers=headers, timeout=120)


def post(server: Served, path: str, body: dict[str, Any]) -> socket.socket:
    """Return an open connection on which the request was sent."""
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
