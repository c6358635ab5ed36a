"""What the supervisor of several workers does without them: it chooses ports, and asks the frontend."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from engine.service.served import free_ports as others

from echo_trt.adapters.dynamo import replicas
from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.process import ProcessLog


class Models(BaseHTTPRequestHandler):
    """Answers as Dynamo's frontend does at /v1/models, or with another ``body``."""

    body = b'{"data": [{"id": "echo"}]}'

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *words: Any) -> None:
        pass


def test_workers_get_ports_of_their_own_and_not_the_frontend_s(monkeypatch):
    ports = others(4)
    monkeypatch.setattr(replicas, "PORTS", ports)
    for reserved in ports:
        assert set(replicas.free_ports(3, reserved)) == {*ports} - {reserved}


def test_the_frontend_is_asked_without_a_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)
    with before(Models) as frontend:
        assert frontend.lists("echo")
        assert not frontend.lists("another")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"detail": "starting"}', b'{"data": 1}', b"\xff"])
def test_a_frontend_that_says_something_else_lists_nothing(body):
    with before(type("Odd", (Models,), {"body": body})) as frontend:
        assert not frontend.lists("echo")


@contextmanager
def before(handler: type[Models]) -> Iterator[replicas.Frontend]:
    """Return what supervises a frontend, where ``handler`` answers in its place."""
    log = ProcessLog(os.open(os.devnull, os.O_WRONLY))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        job = ServeOptions(Path("bundle"), replicas=1, openai_port=server.server_address[1])
        yield replicas.Frontend(job, {}, log, [])
        server.shutdown()
    log.close()
