"""Questions to processes whether they serve. An engine proves it by a real inference."""

from __future__ import annotations

import re
import urllib.request
from http.client import HTTPException
from pathlib import Path

from echo_trt.engine.process import wire
from echo_trt.engine.service.protocol import PROBE

PROBE_SECONDS, METRICS_SECONDS = 20.0, 2.0  # for an answer, and for metrics; larger: a hang is noticed later
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # without http_proxy


class EngineProbe:
    def __init__(self, path: Path):
        self._path, self._seen = str(path), -1.0

    def answers(self, seconds: float = PROBE_SECONDS) -> bool:
        """Return whether a token, or word of another request's iteration (``engine.service``), comes in time."""
        return isinstance(wire.ask(self._path, wire.Submit(1, PROBE), seconds), wire.TextPiece)

    def progresses(self) -> bool:
        """Return whether the engine has iterated since the previous call: long iterations answer a probe late."""
        answer = wire.ask(self._path, wire.Scrape(1), METRICS_SECONDS)
        before, self._seen = self._seen, iterations(answer.text if isinstance(answer, wire.TextReply) else "")
        return self._seen > before

    def lives(self) -> bool:
        """Return whether the engine answers, or still iterates."""
        self.progresses()
        return self.answers() or self.progresses()


def iterations(metrics: str) -> float:
    """Return how often an engine has iterated, as its metrics tell; -1 where they do not."""
    match = re.search(r"^echo_iterations_total(?:{[^}]*})? ([0-9.e+]+)$", metrics, re.MULTILINE)
    return float(match[1]) if match else -1.0


def got(url: str, seconds: float) -> str | None:
    """Return what a GET brings, None where it fails or takes longer."""
    try:
        with open_directly(url, timeout=seconds) as reply:
            text: str = reply.read().decode()
            return text
    except (OSError, ValueError, HTTPException):
        return None


def responds(url: str, seconds: float) -> bool:
    return got(url, seconds) is not None
