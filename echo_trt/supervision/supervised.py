"""Supervised processes: started, watched, restarted if they die, hang or do not start, and drained as one service."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from echo_trt.errors import StartFailed, UserError
from echo_trt.supervision.probe import responds
from echo_trt.supervision.process import Process, ProcessLog, raise_open_files
from echo_trt.supervision.stopping import stop_signals

CHECK_SECONDS = 0.25  # between two checks of the processes; larger: a failure is noticed later
STOP_SECONDS = 10.0  # for processes behind the first ones, without open requests, to stop; larger: a slower end
ANSWER_SECONDS = 10.0  # for an answer among thousands of streams; larger: a hang is noticed later
PROBE_EVERY = 10.0  # seconds between two questions whether a process serves; larger: a hang is noticed later
LONGEST_FOLDER = 107 - len("/engine")  # bytes of a path; the system's limit of a Unix socket's
FAILURES, AGAIN = 3, 1.0  # questions in a row without an answer that are a hang, and seconds between those
WAITS = (0, 1, 4, 16, 60)  # backoff: seconds before the first, second, ... restart in a row, and before all later ones
RESTARTS_WITHIN = 300.0  # seconds after which a restart is forgotten; larger: rare failures are waited for longer


class Supervised(ABC):
    """Keeps a process serving, and reports to ``log``; ``ports``: option -> port on which it listens.

    One that never served is given up at its first failure, one that has served never.

    A subclass starts the process (``_spawn``). Once it listens, it is asked whether it serves (``_ready``), and from
    then on by a thread whether it still does (``_lives``): by a GET of ``url``. A subclass may know further faults
    (``_trouble``), and another way to drain than SIGTERM, after which a process ends by itself.
    """

    name: str
    url: str

    def __init__(self, log: ProcessLog, host: str, ports: dict[str, int], start_seconds: float):
        self.process: Process | None = None
        self.serving = self.served = False  # served: whether it was ever serving
        self._log, self._host, self._ports, self._start_seconds = log, host, ports, start_seconds
        self._watch: LivenessThread | None = None
        self._restarts: deque[float] = deque()
        self._mistake: str | None = None  # the user's, for which it did not start
        self._failed = self._due = 0.0  # time.monotonic() of the failure, and of the next start or its end

    def step(self) -> None:
        """Check it once; to be called repeatedly. Raises StartFailed or UserError if it does not start at first."""
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

    def drain(self) -> None:
        """Let it refuse new requests and finish open ones."""
        if self.process:
            self.process.terminate()

    @property
    def drained(self) -> bool:
        """Whether all its answers have been sent: by default where it has ended."""
        return self.process is None or not self.process.alive

    def end(self) -> None:  # noqa: B027
        """Stop it once it has drained: by default it has ended."""

    @abstractmethod
    def _spawn(self) -> Process: ...

    def _ready(self) -> bool:
        return responds(self.url, 1)

    def _lives(self) -> bool:
        return responds(self.url, ANSWER_SECONDS)

    def _trouble(self) -> str | None:
        if not self.process.alive and not self.serving:
            troubles = (port_trouble(option, self._host, port) for option, port in self._ports.items())
            reason = self.process.reason()
            # A reason that tells the whole.
            self._mistake = next(filter(None, troubles), reason if self.process.refused else None)
            return self._mistake or f"{self.name} did not start: {reason}"
        if not self.process.alive:
            return f"{self.name} has died ({self.process.ended})"
        if self._watch and self._watch.silent:
            return f"{self.name} does not answer"
        if not self.serving and time.monotonic() > self._due:
            given = f"{self._start_seconds} s; raise --start-timeout, or see the lines above"
            return f"{self.name} gave no answer in {given}"
        return None

    def _begin(self) -> None:
        self._watch = LivenessThread(self._lives)
        if self.served:
            self._log.say(f"serving again after {time.monotonic() - self._failed:.1f} s")
        self.serving = self.served = True

    def _restart(self, trouble: str) -> None:
        """Schedule the next start. A failed start belongs to the failure before it, however long it took."""
        now, served = time.monotonic(), self.serving
        self.stop()
        if not self.served:
            raise (UserError if trouble == self._mistake else StartFailed)(f"{trouble}.")
        if served:
            self._failed = now
            while self._restarts and now - self._restarts[0] > RESTARTS_WITHIN:
                self._restarts.popleft()
        wait = WAITS[min(len(self._restarts), len(WAITS) - 1)]
        self._restarts.append(now)
        self._due = now + wait
        self._log.say(f"{trouble}; starting it again{f' in {wait} s' if wait else ''}", "ERROR")


class LivenessThread:
    """A thread that calls ``lives`` at intervals; ``silent`` is true once that failed FAILURES times in a row."""

    def __init__(self, lives: Callable[[], bool]):
        self._lives, self._stop, self.silent = lives, threading.Event(), False
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        failed = 0
        while failed < FAILURES:
            if self._stop.wait(AGAIN if failed else PROBE_EVERY):
                return
            failed = 0 if self._lives() else failed + 1
        self.silent = True


class Supervisor:
    """Processes that are one service: started, supervised, and drained group by group.

    groups         the processes of a group are drained at once; without the first of all, nothing is open
    announcement   what to say once all serve; None: not yet
    drain_seconds  for requests in flight of the first group, in which clients' requests come
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Supervised]],
        stop: threading.Event,
        log: ProcessLog,
        drain_seconds: float,
        announcement: Callable[[], str | None],
    ):
        self._groups, self._stop, self._log, self._drain_seconds = groups, stop, log, drain_seconds
        self._all = [process for group in groups for process in group]
        self._announcement: Callable[[], str | None] | None = announcement

    def run(self) -> int:
        """Run until ``stop`` is set; returns the exit code, 1 where requests in flight were lost.

        Raises StartFailed or UserError where a process does not start.
        """
        try:
            while not self._stop.wait(CHECK_SECONDS):
                for process in self._all:
                    process.step()
                ready = self._announcement and all(process.serving for process in self._all)
                if ready and (text := self._announcement()):
                    self._log.say(text)
                    self._announcement = None
            return self._drain()
        except (StartFailed, UserError):
            self._drain()  # others still have requests in flight
            raise
        finally:
            for process in self._all:
                process.stop()

    def _drain(self) -> int:
        if not self._groups[0][0].serving:  # nothing is open
            return 0
        self._log.say("stopping; requests in flight are finished")
        end = time.monotonic() + self._drain_seconds
        for group in self._groups:
            draining = [process for process in group if process.serving]
            for process in draining:
                process.drain()
            while left := [process for process in draining if not process.drained]:
                dead = [process for process in left if process.process and not process.process.alive]
                if dead or time.monotonic() > end:
                    late = f"not finished in {self._drain_seconds} s"
                    lost = f"lost with {dead[0].name}, which died" if dead else late
                    self._log.say(f"requests in flight were {lost}", "ERROR")
                    return 1
                time.sleep(0.05)
            for process in draining:
                process.end()
            end = max(end, time.monotonic() + STOP_SECONDS)
        return 0


def supervise(prefix: str, form: str, make: Callable[[Path, threading.Event, ProcessLog], Supervisor]) -> int:
    """Run what ``make`` makes, of a folder for its files, until SIGTERM, SIGINT or SIGHUP; returns the exit code.

    ``form``: the log's. Where it gives up, or a start fails, the log's last line says why.
    """
    stop = threading.Event()

    def end(number: int, _: object) -> None:
        if number == signal.SIGINT and stop.is_set():  # a second Ctrl-C does not wait for answers
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, *stop_signals()):
        signal.signal(number, end)
    raise_open_files()
    log = ProcessLog(sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY), form=form)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as work:
            if len(os.fsencode(work)) > LONGEST_FOLDER:
                raise UserError(
                    f"TMPDIR leads to {work}, too long a path for a socket; set it to a short one, as /tmp."
                )
            return make(Path(work), stop, log).run()
    except (StartFailed, UserError) as error:
        log.say(str(error), "ERROR")
        return 1 if isinstance(error, StartFailed) else 2
    finally:
        log.close()


def port_trouble(option: str, host: str, port: int) -> str | None:
    """Return why a port is not free, in a clause with the remedy, or None."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            return f"{option} {port} on {host} cannot be used ({error.strerror}); free it, or give another port"
    return None
