"""A child process that does not outlive this one, whose output is shown, and whose ports can be checked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import resource
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterable
from functools import partial

import psutil

from echo_trt.engine.host_memory import gigabytes, memory_limit
from echo_trt.files.log import Line, line, read, written

_LIBC = ctypes.CDLL(None)


class ProcessLog:
    """A log that a thread writes to a file descriptor, so that a full disk or a stalled reader blocks no caller.

    A line is dropped if it cannot be written, or if ``maximum`` lines wait. ``form``: of ``files.log.FORMATS``.
    """

    def __init__(self, descriptor: int, maximum: int = 10_000, form: str = "text"):
        self._descriptor, self._lines, self._form = descriptor, queue.Queue(maximum), form
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def say(self, text: str, level: str = "INFO") -> None:
        """Say lines of the launcher's own."""
        for each in text.splitlines():
            self.write(line(level, "serve", each))

    def write(self, line: Line) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(f"{written(line, self._form)}\n".encode(errors="replace"))

    def close(self, seconds: float = 1.0) -> None:
        """End the thread, after ``seconds`` for the waiting lines."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(seconds)

    def _write(self) -> None:
        while line := self._lines.get():
            with contextlib.suppress(OSError):  # sys.stderr would keep the line and fail again at exit
                os.write(self._descriptor, line)


class Process:
    """A child process whose lines are shown as they come; the last ones are kept."""

    stack: int | None = None  # bytes of a thread's stack, allocated as used; None: as the system has it

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: ProcessLog):
        self.name = name
        self.lines: deque[str] = deque(maxlen=200)
        self._log = log
        self._child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # only the launcher gets a terminal's Ctrl-C
            preexec_fn=partial(_prepare, self.stack),
        )
        self._relay = threading.Thread(target=self._show_lines, daemon=True)
        self._relay.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._child.poll()

    @property
    def ended(self) -> str:
        """How it has ended, in words."""
        code = self.exit_code or 0
        return f"signal {-code}, {signal.strsignal(-code)}{_of_memory(code)}" if code < 0 else f"exit code {code}"

    def children(self) -> set[int]:
        """Return ids of the processes that it started itself, with those that died and were not waited for."""
        with contextlib.suppress(psutil.Error):
            return {child.pid for child in psutil.Process(self.pid).children()}
        return set()

    def listens_on(self, ports: Iterable[int]) -> bool:
        """Return whether this process listens on all these TCP ports: another process might answer on one."""
        return listening_ports(self.pid).issuperset(ports)

    @property
    def refused(self) -> bool:
        """Whether it has ended for the user's mistake."""
        return self.exit_code == 2

    def reason(self) -> str:
        """Return the likely reason of its end, in a clause."""
        self._relay.join(1)  # seconds, since a grandchild may hold the pipe open
        code = self._child.poll() or 0
        return f"signal {-code} ended it{_of_memory(code)}" if code < 0 else reason(self.lines)

    def terminate(self) -> None:
        if self.alive:
            self._child.terminate()

    def wait(self, seconds: float) -> bool:
        try:
            self._child.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill it with everything that it started."""
        orphans = self.children()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._child.wait()

    def _show_lines(self) -> None:
        """Empty the pipe and show its lines; a child that writes into a full pipe would stand still."""
        for raw in self._child.stdout:
            found = self._read(raw.decode(errors="replace").rstrip())
            if found is None:
                continue
            grave = found["level"] in ("ERROR", "CRITICAL")
            self.lines.append(f"error: {found['message']}" if grave else str(found["message"]))
            self._log.write(found)

    def _read(self, text: str) -> Line | None:
        """Read a line of its output; None: it is not worth showing."""
        return read(text, self.name) if text else None


def listening_ports(pid: int) -> set[int]:
    with contextlib.suppress(psutil.Error):
        sockets = psutil.Process(pid).net_connections("tcp")
        return {each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN}
    return set()


def raise_open_files() -> None:
    """Raise the limit of open files, also of children, to the system's: a connection takes two in the API server."""
    _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


def reason(lines: Iterable[str]) -> str:
    """Return the line that explains a failed start best."""
    relevant = [line for line in lines if line.strip()]
    errors = [line for line in relevant if "error:" in line or "Error" in line]
    line = (errors or relevant or ["it said nothing"])[0 if errors else -1]
    for mark in ("UserError: ", "error: "):
        line = line.split(mark, 1)[-1]
    return " ".join(line.split()).rstrip(".")[:400]


def _of_memory(code: int) -> str:
    """Say with which limit the kernel may have killed a process, if it ended so and there is one."""
    limit = memory_limit() if code == -signal.SIGKILL else None
    return f", as the kernel does where this container's memory limit, {gigabytes(limit)}, is reached" if limit else ""


def _prepare(stack: int | None) -> None:
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if stack is not None:
        _, maximum = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(
            resource.RLIMIT_STACK, (stack if maximum == resource.RLIM_INFINITY else min(stack, maximum), maximum)
        )
