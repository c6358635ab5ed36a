"""A process that is kept serving: started, watched, started again where it dies, hangs or does not start."""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections import deque

from echo_trt.errors import UserError
from echo_trt.launch.probe import Watch
from echo_trt.launch.process import Log, Process

#: Seconds to wait before each restart; after so many of them it is given up.
WAITS = (0, 1, 4, 16, 60)
RESTARTS_WITHIN = 300.0  # seconds; what lies back further when it fails is forgotten


class Supervised(ABC):
    """Says what it does to ``log``. ``ports`` are what it listens on, under the options that give them.

    A subclass says how the process is started (``_spawn``), whether it serves once it listens (``_ready``), how it is
    asked from then on, by a thread, whether it still does (``_lives``), and what else may be wrong (``_trouble``).
    """

    name: str

    def __init__(self, log: Log, host: str, ports: dict[str, int], start_seconds: float):
        self.process: Process | None = None
        self.serving = self.served = False  # now; at any time until now
        self._log, self._host, self._ports, self._start_seconds = log, host, ports, start_seconds
        self._watch: Watch | None = None
        self._restarts: deque[float] = deque()
        self._failed = self._due = 0.0  # when it ceased to serve, when to start it: of time.monotonic()

    def step(self) -> None:
        """Looks at it once; to be called again and again. Raises UserError where it does not start or is given up."""
        if self.process is None:
            if time.monotonic() >= self._due:
                self.process, self._due = self._spawn(), time.monotonic() + self._start_seconds
        elif trouble := self._trouble():
            self._restart(trouble)
        elif not self.serving and self.process.listens_on(self._ports.values()) and self._ready():
            self._begin()

    def stop(self) -> None:
        """At once, with all that it has open."""
        self.serving = False
        if self._watch:
            self._watch.stop()
            self._watch = None
        if self.process:
            self.process.kill()
            self.process = None

    @abstractmethod
    def _spawn(self) -> Process: ...

    @abstractmethod
    def _ready(self) -> bool: ...

    @abstractmethod
    def _lives(self) -> bool: ...

    def _trouble(self) -> str | None:
        """What is wrong, in a clause."""
        if not self.process.alive and not self.serving:
            taken = (port_trouble(option, self._host, port) for option, port in self._ports.items())
            return next(filter(None, taken), None) or f"{self.name} did not start: {self.process.reason()}"
        if not self.process.alive:
            return f"{self.name} has died"
        if self._watch and self._watch.silent:
            return f"{self.name} does not answer"
        if not self.serving and time.monotonic() > self._due:
            given = f"{self._start_seconds} s; raise --start-timeout, or see the lines above"
            return f"{self.name} gave no answer in {given}"
        return None

    def _begin(self) -> None:
        self._watch = Watch(self._lives)
        if self.served:
            self._log.say(f"serving again after {time.monotonic() - self._failed:.1f} s")
        self.serving = self.served = True

    def _restart(self, trouble: str) -> None:
        """Sets the next start. A failed start adds to the failure before it, however long it took."""
        now, served = time.monotonic(), self.serving
        self.stop()
        if not self.served:
            raise UserError(f"{trouble}.")
        if served:
            self._failed = now
            while self._restarts and now - self._restarts[0] > RESTARTS_WITHIN:
                self._restarts.popleft()
        if len(self._restarts) == len(WAITS):
            self._log.say(f"{trouble}; giving up")
            raise UserError(f"{len(WAITS)} restarts were no cure: {trouble}.")
        wait = WAITS[len(self._restarts)]
        self._restarts.append(now)
        self._due = now + wait
        self._log.say(f"{trouble}; starting it again{f' in {wait} s' if wait else ''}")


def port_trouble(option: str, host: str, port: int) -> str | None:
    """Why nobody can listen there now, in a clause with the remedy."""
    with socket.socket() as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            return f"{option} {port} on {host} cannot be used ({error.strerror}); free it, or give another port"
    return None
