"""A child process: it does not outlive this one, what it says is shown, and whether a port is its own can be told."""

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
from pathlib import Path

#: What Triton complains about where there is no GPU; where there is one, it means what it says.
HARMLESS = () if Path("/proc/driver/nvidia").exists() else ("cuda", "dcgm", "nvml")
STACK = 512 * 2**20  # bytes a thread, taken as used: Triton 2.51 parses JSON by recursion, 170 bytes a bracket
LISTENING = "0A"  # a socket's state in /proc/net/tcp
_LIBC = ctypes.CDLL(None)


class Log:
    """Lines for a file descriptor, written by a thread: a full disk or a reader that left or stalls stops nobody.

    What cannot be written is dropped, and so is what comes while ``most`` lines wait.
    """

    def __init__(self, descriptor: int, most: int = 10_000):
        self._descriptor, self._lines = descriptor, queue.Queue(most)
        self._writer = threading.Thread(target=self._write, name="log", daemon=True)
        self._writer.start()

    def say(self, line: str) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(f"{line}\n".encode(errors="replace"))

    def close(self, seconds: float = 1.0) -> None:
        """Gives what waits so long to be written."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(seconds)

    def _write(self) -> None:
        while line := self._lines.get():
            with contextlib.suppress(OSError):  # not through sys.stderr, which would keep it and fail at exit again
                os.write(self._descriptor, line)


class Process:
    """A child whose last lines are kept, and shown as they come."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Log):
        self.name = name
        self.lines: deque[str] = deque(maxlen=200)
        self._log = log
        self._child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is the launcher's to handle
            preexec_fn=_prepare,
        )
        self._relay = threading.Thread(target=self._show_lines, daemon=True)
        self._relay.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def children(self) -> set[int]:
        """Process ids of what it started, directly; those that died unnoticed by it are among them."""
        found: set[int] = set()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(OSError):  # threads come and go
                    found.update(map(int, (task / "children").read_text().split()))
        return found

    def listens_on(self, ports: Iterable[int]) -> bool:
        """Whether each of these TCP ports is this process's own: on another's, others would answer in its place."""
        sockets, found = set(), set()
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # they come and go
                    sockets.add(os.readlink(descriptor))
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):  # no IPv6
                for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                    _, address, _, state, *_, inode = line.split()[:10]
                    if state == LISTENING and f"socket:[{inode}]" in sockets:
                        found.add(int(address.rpartition(":")[2], 16))
        return found.issuperset(ports)

    def reason(self) -> str:
        """Why it has ended, in a clause, as far as can be told."""
        self._relay.join(1)  # seconds; a child of its own may hold the pipe open
        code = self._child.poll() or 0
        return f"signal {-code} ended it" if code < 0 else reason(self.lines)

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
        """With everything that it started."""
        orphans = self.children()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._child.wait()

    def _show_lines(self) -> None:
        """Empties the pipe, whatever comes: a child that writes into a full one stands still."""
        for raw in self._child.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.lines.append(line)
            if line and not _is_harmless(line):
                self._log.say(f"{self.name}: {line}")


def lives(pid: int) -> bool:
    """False for a zombie too: Triton never waits for a backend that has died."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def raise_open_files() -> None:
    """As many as the system allows, here and in children: each connection is one, on both sides of the gateway."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def reason(lines: Iterable[str]) -> str:
    """The line that tells most of a failed start."""
    told = [line for line in lines if line.strip() and not _is_harmless(line)]
    errors = [line for line in told if "UserError" in line or "error:" in line or "Error" in line]
    line = (errors or told or ["it said nothing"])[0 if errors else -1]
    for mark in ("UserError: ", "error: "):
        line = line.split(mark, 1)[-1]
    line = line.split(r"\n\nAt:", 1)[0]  # Triton prints a model's error with its Python frames, on one line
    return " ".join(line.split()).rstrip(".")[:400]


def _prepare() -> None:
    """In a child, before it becomes what it will be."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK if most == resource.RLIM_INFINITY else min(STACK, most)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, most))


def _is_harmless(line: str) -> bool:
    return any(word in line.lower() for word in HARMLESS)
