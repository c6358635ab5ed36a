"""What the supervisor of several workers does without them: it chooses ports, and asks the frontend."""

from __future__ import annotations

import os
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from serving.served import free_ports as others

from echo_trt.dynamo import replicas
from echo_trt.launch.process import Log


class Models(BaseHTTPRequestHandler):
    """Answers as Dynamo's frontend does at /v1/models."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "echo"}]}')

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
    log = Log(os.open(os.devnull, os.O_WRONLY))
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        job = replicas.Job(Path("bundle"), 1, port=server.server_address[1])
        frontend = replicas.Frontend(job, {}, log, [])
        assert frontend.lists("echo")
        assert not frontend.lists("another")
        server.shutdown()
    log.close()
