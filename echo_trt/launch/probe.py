"""Probes of an engine by a real inference: Triton's health endpoint is well while the backend is dead."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from echo_trt.serving import wire
from echo_trt.serving.protocol import FIRST, MODEL

# Seconds between two probes, and for an answer. Larger: less work for the server, a hang is noticed later.
PROBE_EVERY, PROBE_SECONDS = 10.0, 20.0
METRICS_SECONDS = 2.0  # for metrics
PROBE = {"input_ids": [0], "max_tokens": 1, "priority": FIRST, "ignore_eos": True}
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # without http_proxy


class EngineProbe:
    """The probe of an engine's process at the socket ``path``."""

    def __init__(self, path: Path):
        self._path, self._seen = str(path), -1.0

    def answers(self, seconds: float) -> bool:
        """Return whether one token, or word of an iteration for other requests (``serving.service``), comes in time."""
        return isinstance(wire.ask(self._path, wire.Submit(1, PROBE), seconds), wire.Piece)

    def progresses(self) -> bool:
        """Return whether the engine has iterated since the previous call: long iterations answer a probe late."""
        text = self._metrics_text()
        match = re.search(r"^echo_iterations_total(?:{[^}]*})? ([0-9.e+]+)$", text, re.MULTILINE)
        before, self._seen = self._seen, float(match[1]) if match else -1.0
        return self._seen > before

    def lives(self) -> bool:
        """Return whether the engine answers, or still iterates."""
        self.progresses()
        return self.answers(PROBE_SECONDS) or self.progresses()

    def _metrics_text(self) -> str:
        answer = wire.ask(self._path, wire.Scrape(1), METRICS_SECONDS)
        return answer.text if isinstance(answer, wire.Text) else ""


class Probe(EngineProbe):
    """The probe of a Triton server at ``host``."""

    def __init__(self, host: str, http_port: int, metrics_port: int):
        self._server, self._metrics = f"http://{host}:{http_port}", f"http://{host}:{metrics_port}"
        self._seen = -1.0

    def answers(self, seconds: float) -> bool:
        """As of an engine's process."""
        url, body = f"{self._server}/v2/models/{MODEL}/generate", json.dumps(PROBE).encode()
        try:
            with open_directly(urllib.request.Request(url, body), timeout=seconds) as reply:
                answer = json.load(reply)
        except (OSError, ValueError, HTTPException):
            return False
        return "output_ids" in answer

    def _metrics_text(self) -> str:
        try:
            with open_directly(f"{self._metrics}/metrics", timeout=METRICS_SECONDS) as reply:
                text: str = reply.read().decode()
        except (OSError, ValueError, HTTPException):
            return ""
        return text


def responds(url: str, seconds: float) -> bool:
    """Return whether a GET succeeds in time."""
    try:
        with open_directly(url, timeout=seconds):
            return True
    except (OSError, HTTPException):
        return False


class Watch:
    """A thread that calls ``lives`` at intervals; ``silent`` is true once that failed."""

    def __init__(self, lives: Callable[[], bool]):
        self._lives, self._stop, self.silent = lives, threading.Event(), False
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(PROBE_EVERY):
            if not self._lives():
                self.silent = True
                return
