"""The processes of ranks 1 and up: started, told each call, and never waited for in vain.

A process is told what to do through a pipe, and ends when the pipe does. It is started as
``python -m echo_trt.backends.parallel.rank_processes``.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from echo_trt.errors import UserError

#: Until a process has its modules; until its engine is loaded; of a call in which no rank answers; after which a call
#: that nothing ends takes this process with it.
IMPORT_SECONDS, OPEN_SECONDS, CALL_SECONDS, LAST_SECONDS = 120.0, 3600.0, 300.0, 30.0
STDERR = 2
LOOK = 0.5  # seconds between two looks at a call in flight
HERE, READY = "here", "ready"


@dataclass(frozen=True)
class Failed:
    """A rank's last words."""

    sentence: str


@dataclass(eq=False)
class _Process:
    rank: int
    child: subprocess.Popen
    pipe: Connection
    said: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)


class RankProcesses:
    """Ranks 1 to ``ranks`` - 1. ``loss`` says why they cannot be called any more; ``abort`` frees a call of rank 0.

    A thread listens to them: a rank that ends, or a call of more than ``patience`` seconds, is the end of all.
    """

    def __init__(self, ranks: int, port: int, patience: float = CALL_SECONDS):
        self.ranks, self.loss = ranks, ""
        self.abort: Callable[[], None] = lambda: None
        self._patience, self._since, self._lost_at, self._closed = patience, None, None, False
        self._processes = [_start(rank, ranks, port) for rank in range(1, ranks)]
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def hear(self, word: str, seconds: float) -> None:
        """Wait until every process has said ``word``; what one says instead is the refusal."""
        until = time.monotonic() + seconds
        for process in self._processes:
            try:
                said = process.said.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                self._lose(f"rank {process.rank} of {self.ranks} is not {word} after {seconds:.0f} s")
            if self.loss or said != word:
                raise UserError(self.loss)

    def tell(self, message: Any) -> None:
        if self.loss:
            raise UserError(self.loss)
        for process in self._processes:
            try:
                process.pipe.send(message)
            except OSError as error:
                self._wait_for_loss()
                raise UserError(self.loss) from error

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """A call of rank 0, during which the others must answer."""
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:
            # Where another rank is gone, that is the reason; it may not have been noticed yet.
            self._wait_for_loss()
            self._lose(f"rank 0 of {self.ranks} failed ({_one_line(error)})")
            raise UserError(self.loss) from error
        finally:
            self._since = None
        if self.loss:
            raise UserError(self.loss)

    def close(self) -> None:
        self._closed = True
        for process in self._processes:
            process.child.kill()
            process.child.wait()
            process.pipe.close()

    def _listen(self) -> None:
        pipes = {process.pipe: process for process in self._processes}
        while not self._closed:
            try:
                ready = wait(pipes, LOOK)
            except OSError:  # closed
                return
            for pipe in ready:
                try:
                    said = pipe.recv()
                except (EOFError, OSError):
                    process = pipes.pop(pipe)
                    said = Failed(f"rank {process.rank} of {self.ranks} has ended ({_ending(process.child)})")
                if isinstance(said, Failed) and not self._closed:
                    self._lose(said.sentence)
                for process in self._processes if isinstance(said, Failed) else [pipes[pipe]]:
                    process.said.put(said)
            self._check_patience()

    def _check_patience(self) -> None:
        now, since = time.monotonic(), self._since
        if since is not None and now - since > self._patience:
            self._lose(f"a rank of {self.ranks} has not answered for {self._patience:.0f} s")
        if since is not None and self._lost_at is not None and now - self._lost_at > LAST_SECONDS:
            print(f"error: {self.loss}", file=sys.stderr, flush=True)
            os._exit(2)

    def _lose(self, why: str) -> None:
        if self.loss:
            return
        self.loss = why if why.endswith(".") else f"{why}; start again, its own messages are above."
        self._lost_at = time.monotonic()
        for process in self._processes:
            process.child.kill()
        self.abort()

    def _wait_for_loss(self, seconds: float = 3.0) -> None:
        until = time.monotonic() + seconds
        while not self.loss and time.monotonic() < until:
            time.sleep(0.01)


def _start(rank: int, ranks: int, port: int) -> _Process:
    ours, theirs = Pipe()
    words = ["-m", __name__, theirs.fileno(), rank, ranks, port]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.Popen(
        [_python(), *map(str, words)],
        env=environment,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=STDERR,  # NCCL talks on it, and answers are rank 0's to print
        start_new_session=True,  # a terminal's Ctrl-C is rank 0's to handle
    )
    theirs.close()
    return _Process(rank, child, ours)


def _python() -> str:
    """In a server that embeds Python, sys.executable is the server."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_python_version()}")


def _ending(child: subprocess.Popen) -> str:
    try:
        code = child.wait(5)
    except subprocess.TimeoutExpired:
        return "its pipe is closed"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")[:200]


def main(pipe: Connection, rank: int, ranks: int, port: int) -> None:
    """Be one rank: open the engine that comes through the pipe, then make the calls that come after it."""
    messages: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, messages), daemon=True).start()
    try:
        import torch.distributed as dist

        from echo_trt.backends.parallel.rank_group import HOST, join

        pipe.send(HERE)
        open_rank, patience = messages.get()
        engine = open_rank(join(dist.TCPStore(HOST, port, ranks), rank, ranks, patience))
        pipe.send(READY)
        while True:
            method, arguments, inputs = messages.get()
            getattr(engine, method)(*arguments, **inputs)
    except UserError as error:
        pipe.send(Failed(str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(Failed(f"rank {rank} of {ranks} failed ({_one_line(error)})"))
    os._exit(1)  # nothing of a broken group is waited for


def _receive(pipe: Connection, messages: queue.SimpleQueue) -> None:
    """Whatever this process is busy with, it ends when rank 0 does."""
    while True:
        try:
            messages.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    from echo_trt.backends.parallel import rank_processes

    fd, *place = map(int, sys.argv[1:])
    rank_processes.main(Connection(fd), *place)
