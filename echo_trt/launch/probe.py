"""Is it alive? A health endpoint says yes while the backend is dead, so a real inference is asked for."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Callable
from http.client import HTTPException

from echo_trt.serving.protocol import FIRST, MODEL

PROBE_EVERY, PROBE_SECONDS = 10.0, 20.0
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # whatever http_proxy says


class Probe:
    """Of a server at ``host``; ports as the launcher's."""

    def __init__(self, host: str, http_port: int, metrics_port: int):
        self._server, self._metrics = f"http://{host}:{http_port}", f"http://{host}:{metrics_port}"
        self._seen = -1.0

    def answers(self, seconds: float) -> bool:
        """Whether one token comes back in time, or word of an iteration for others (``serving.service``)."""
        request = {"input_ids": [0], "max_tokens": 1, "priority": FIRST, "ignore_eos": True}
        url, body = f"{self._server}/v2/models/{MODEL}/generate", json.dumps(request).encode()
        try:
            with _open(urllib.request.Request(url, body), timeout=seconds) as reply:
                answer = json.load(reply)
        except (OSError, ValueError, HTTPException):
            return False
        return "output_ids" in answer

    def progresses(self) -> bool:
        """Whether the engine has done something since this was last asked: long iterations answer a probe late."""
        try:
            with _open(f"{self._metrics}/metrics", timeout=2) as reply:
                text = reply.read().decode()
        except (OSError, HTTPException):
            return False
        found = re.search(r"^echo_iterations_total(?:{[^}]*})? ([0-9.e+]+)$", text, re.MULTILINE)
        before, self._seen = self._seen, float(found[1]) if found else -1.0
        return self._seen > before

    def lives(self) -> bool:
        """Whether it answers, or still does something."""
        self.progresses()
        return self.answers(PROBE_SECONDS) or self.progresses()


def responds(url: str, seconds: float) -> bool:
    """Whether a GET succeeds in time."""
    try:
        with _open(url, timeout=seconds):
            return True
    except (OSError, HTTPException):
        return False


class Watch:
    """Asks a server now and then, on a thread of its own, whether it ``lives``; ``silent`` once it did not."""

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
