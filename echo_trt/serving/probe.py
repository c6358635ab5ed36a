"""Is it alive? A health endpoint says yes while the backend is dead, so a real inference is asked for."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request

from echo_trt.serving.triton_server import MODEL

#: A probe's priority, by which it is known: before everyone else in the queue.
FIRST = -(2**31)
PROBE_EVERY, PROBE_SECONDS = 10.0, 20.0


class Probe:
    """Of a server at ``host``; ports as the launcher's."""

    def __init__(self, host: str, http_port: int, metrics_port: int):
        self._server, self._metrics = f"http://{host}:{http_port}", f"http://{host}:{metrics_port}"
        self._seen = -1.0

    def answers(self, seconds: float) -> bool:
        """Whether one token comes back in time, or a refusal for lack of room."""
        request = {"input_ids": [0], "max_tokens": 1, "priority": FIRST, "ignore_eos": True}
        url, body = f"{self._server}/v2/models/{MODEL}/generate", json.dumps(request).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=seconds) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            return b"queue is full" in error.read()
        except (OSError, ValueError):
            return False
        return "output_ids" in answer or "queue is full" in str(answer.get("error"))

    def progresses(self) -> bool:
        """Whether the engine has done something since this was last asked: a busy server may leave no place to ask."""
        try:
            with urllib.request.urlopen(f"{self._metrics}/metrics", timeout=2) as reply:
                text = reply.read().decode()
        except OSError:
            return False
        found = re.search(r"^echo_iterations_total(?:{[^}]*})? ([0-9.e+]+)$", text, re.MULTILINE)
        before, self._seen = self._seen, float(found[1]) if found else -1.0
        return self._seen > before


class Watch:
    """Probes a server now and then, on a thread of its own; ``silent`` once it did not answer."""

    def __init__(self, probe: Probe):
        self._probe, self._stop, self.silent = probe, threading.Event(), False
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(PROBE_EVERY):
            self._probe.progresses()
            if not self._probe.answers(PROBE_SECONDS) and not self._probe.progresses():
                self.silent = True
                return
