"""Questions to processes whether they serve. An engine proves it by a real inference."""

from __future__ import annotations

import re
import socket
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from echo_trt.engine.process.client import Client, EngineError

PROBE_SECONDS, METRICS_SECONDS = 10.0, 2.0  # for an answer, and for metrics; larger: a hang is noticed later
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # without http_proxy


async def engine_works(path: Path, seconds: float = PROBE_SECONDS, patient: bool = False) -> bool:
    """Return whether the engine whose host listens at ``path`` answers a probe in time (``Client.check``).

    patient  whether it is enough that the engine has iterated meanwhile: long iterations answer a probe late
    """
    client = Client(path)
    try:
        before = iterations(await client.metrics() or "") if patient else 0.0
        with suppress(EngineError):
            await client.check(seconds)
            return True
        return patient and before >= 0 and iterations(await client.metrics() or "") > before
    finally:
        await client.close()


def tells(path: Path, seconds: float) -> bool:
    """Return whether the process that listens on a socket for this question alone sends its byte in time."""
    with socket.socket(socket.AF_UNIX) as question, suppress(OSError):
        question.settimeout(seconds)
        question.connect(str(path))
        return bool(question.recv(1))
    return False


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
