"""Triton as a supervised process: its Python model holds the engine, and its faults are its own."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import psutil

from echo_trt.adapters.triton.server import TritonServer, remove_regions
from echo_trt.files.log import OWN, Line, line
from echo_trt.supervision.engine import EngineProcess
from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.probe import responds
from echo_trt.supervision.process import Process, ProcessLog
from echo_trt.supervision.supervised import ANSWER_SECONDS

REAP_SECONDS = 5.0  # for Triton to reap a backend that ends in good order; larger: a dead backend is noticed later
FLUSH_SECONDS, STOP_SECONDS = 0.5, 10.0  # for Triton to send the last tokens, and to stop; larger: a slower end
#: Words of complaints that are harmless on a machine without a GPU.
HARMLESS = () if Path("/proc/driver/nvidia").exists() else ("cuda", "dcgm", "nvml")
_BEGINNING = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ ")  # of Triton's own lines
_LEVELS = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}


class TritonProcess(Process):
    """Triton's process, whose lines have a form of their own."""

    # Triton 2.51 parses JSON by recursion at 170 bytes a bracket. Larger: it survives deeper nesting.
    stack = 512 * 2**20

    @property
    def refused(self) -> bool:
        return any("UserError: " in line for line in self.lines)

    def reason(self) -> str:
        """Return the reason without the Python frames that Triton prints behind a model's error, on one line."""
        return super().reason().split(r"\n\nAt:", 1)[0].rstrip(".")

    def _read(self, text: str) -> Line | None:
        if not text.startswith(OWN) and any(word in text.lower() for word in HARMLESS):
            return None
        if found := _BEGINNING.match(text):
            return line(_LEVELS[found[1]], self.name, text[found.end() :])
        return super()._read(text)


class Triton(EngineProcess):
    """Triton, whose Python model holds the engine."""

    name = "Triton"

    def __init__(self, job: ServeOptions, server: TritonServer, work: Path, log: ProcessLog):
        super().__init__(job, work, log)
        self._ports = {option: port for option, port in job.ports.items() if option != "--openai-port"}
        self._server, self._work, self._signals = server, work, work
        self.url = f"http://{job.reached_at}:{job.triton_ports['http']}/v2/health/ready"
        self._backends: set[int] = set()
        self._starts, self._sound = 0, 0.0  # _sound: last time.monotonic() without a dead backend

    def _spawn(self) -> Process:
        job = self._job
        remove_regions()
        self.socket.unlink(missing_ok=True)
        self._starts += 1
        self._sound = time.monotonic()
        self._signals = self._work / str(self._starts)
        self._signals.mkdir()
        given = {
            "BUNDLE": job.bundle.resolve(),
            **{name.replace("-", "_").upper(): value for name, value in job.given.items()},
            "SIGNALS": self._signals,
            "SOCKET": self.socket,
            "LOG_FORMAT": "json",
        }
        settings = {f"ECHO_TRT_{name}": str(value) for name, value in given.items()}
        command = self._server.command(job.host, self._ports, self._signals)
        return TritonProcess("triton", command, self._server.environment(settings), self._log)

    def _ready(self) -> bool:
        answered = responds(self.url, ANSWER_SECONDS) and super()._ready()
        self._backends = self._children()
        return answered

    def _lives(self) -> bool:
        return responds(self.url, ANSWER_SECONDS) and super()._lives()

    def _trouble(self) -> str | None:
        """Find a dead backend, which Triton does not notice: open requests and its start would hang."""
        if trouble := super()._trouble():
            return trouble
        now, backends = time.monotonic(), self._backends if self.serving else self._children()
        if all(map(_lives, backends)):
            self._sound = now
        elif self.serving:
            return "Triton's backend has died"
        elif now - self._sound > REAP_SECONDS:
            return "Triton's backend died while it loaded the bundle, as it does for want of memory; free some"
        return None

    def _children(self) -> set[int]:
        return self.process.children() if self.process else set()

    def drain(self) -> None:
        """Let the model refuse new requests and finish open ones: Triton does not count the API server's."""
        (self._signals / "drain").touch()

    @property
    def drained(self) -> bool:
        """Whether all answers have been sent."""
        return (self._signals / "drained").exists()

    def end(self) -> None:
        time.sleep(FLUSH_SECONDS)
        if self.process:
            self.process.terminate()
            self.process.wait(STOP_SECONDS)


def _lives(pid: int) -> bool:
    """Return whether a process runs; a zombie does not, and Triton never waits for a backend that has died."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False
