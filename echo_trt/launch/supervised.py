"""A supervised process: started, watched, and restarted if it dies, hangs or does not start."""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections import deque

from echo_trt.errors import UserError
from echo_trt.launch.probe import Watch
from echo_trt.launch.process import Log, Process

#: Backoff: seconds before the first, second, ... restart in a row; after the last one it gives up. Longer: more
#: attempts before that.
WAITS = (0, 1, 4, 16, 60)
RESTARTS_WITHIN = 300.0  # seconds after which a restart is forgotten; larger: rare failures add up to giving up


class Supervised(ABC):
    """Keeps a process serving, and reports to ``log``; ``ports``: option -> port on which it listens.

    A subclass starts the process (``_spawn``) and checks whether it serves once it listens (``_ready``). From then on a
    thread checks whether it still serves (``_lives``). A subclass may know further faults (``_trouble``).
    """

    name: str

    def __init__(self, log: Log, host: str, ports: dict[str, int], start_seconds: float):
        self.process: Process | None = None
        self.serving = self.served = False  # served: whether it was ever serving
        self._log, self._host, self._ports, self._start_seconds = log, host, ports, start_seconds
        self._watch: Watch | None = None
        self._restarts: deque[float] = deque()
        self._failed = self._due = 0.0  # time.monotonic() of the failure, and of the next start or its end

    def step(self) -> None:
        """Check it once; to be called repeatedly. Raises UserError if it does not start or is given up."""
        if self.process is None:
            if time.monotonic() >= self._due:
                self.process, self._due = self._spawn(), time.monotonic() + self._start_seconds
        elif trouble := self._trouble():
            self._restart(trouble)
        elif not self.serving and self.process.listens_on(self._ports.values()) and self._ready():
            self._begin()

    def stop(self) -> None:
        """Kill it at once, with its open requests."""
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
        """Return the fault, in a clause, or None."""
        if not self.process.alive and not self.serving:
            troubles = (port_trouble(option, self._host, port) for option, port in self._ports.items())
            return next(filter(None, troubles), None) or f"{self.name} did not start: {self.process.reason()}"
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
        """Schedule the next start. A failed start belongs to the failure before it, however long it took."""
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
    """Return why a port is not free, in a clause with the remedy, or None."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            return f"{option} {port} on {host} cannot be used ({error.strerror}); free it, or give another port"
    return None
