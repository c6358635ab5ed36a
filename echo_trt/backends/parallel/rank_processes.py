"""The processes of ranks 1 and up, which receive the calls of rank 0; a lost process fails a call and hangs none.

A process receives its work through a pipe, and ends when the pipe closes. It runs
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

from echo_trt.errors import UserError, described

#: Time limits of importing modules, of loading an engine, of a call, and of a call's end after a rank was lost, when
#: this process exits. Larger: slower machines are waited for, and a hang is noticed later.
IMPORT_SECONDS, OPEN_SECONDS, CALL_SECONDS, LAST_SECONDS = 120.0, 3600.0, 300.0, 30.0
STDERR = 2
CHECK_SECONDS = 0.5  # between two checks of a call in flight; larger: a hang is noticed later
HERE, LOADED, READY = "here", "loaded", "ready"  # a rank's words to rank 0


@dataclass(frozen=True)
class Failed:
    """A rank's failure, as a message."""

    sentence: str


@dataclass(eq=False)
class _Process:
    rank: int
    child: subprocess.Popen
    pipe: Connection
    messages: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)


class RankProcesses:
    """The processes of ranks 1 to ``ranks`` - 1.

    A thread listens to them. A rank that ends, or a call of more than ``patience`` seconds, ends all ranks: ``loss``
    is then the reason, and ``abort`` frees a call of rank 0.
    """

    def __init__(self, ranks: int, port: int, patience: float = CALL_SECONDS):
        self.ranks, self.loss = ranks, ""
        self.abort: Callable[[], None] = lambda: None
        self._patience, self._since, self._lost_at, self._closed = patience, None, None, False
        self._processes = [_start(rank, ranks, port) for rank in range(1, ranks)]
        threading.Thread(target=self._listen, name="ranks", daemon=True).start()

    def hear(self, word: str, seconds: float) -> None:
        """Wait until every process has sent ``word``; another message is raised as the loss."""
        until = time.monotonic() + seconds
        for process in self._processes:
            try:
                message = process.messages.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                self._lose(f"rank {process.rank} of {self.ranks} is not {word} after {seconds:.0f} s")
            if self.loss or message != word:
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
        """Watch a call of rank 0, during which the other ranks must answer."""
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:  # it is the cause of what is raised, whose traceback the service logs
            # A lost rank is the reason if there is one, which the listener may not have noticed yet.
            self._wait_for_loss()
            self._lose(f"rank 0 of {self.ranks} failed ({described(error)})")
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
                ready = wait(pipes, CHECK_SECONDS)
            except OSError:  # closed
                return
            for pipe in ready:
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    process = pipes.pop(pipe)
                    message = Failed(f"rank {process.rank} of {self.ranks} has ended ({_ending(process.child)})")
                if isinstance(message, Failed) and not self._closed:
                    self._lose(message.sentence)
                for process in self._processes if isinstance(message, Failed) else [pipes[pipe]]:
                    process.messages.put(message)
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
        # In a thread: NCCL aborts a communicator when all graphs with its collectives are gone, and this engine has its
        # own until it is closed. The collective that waits for the lost rank ends at once.
        threading.Thread(target=self.abort, name="abort", daemon=True).start()

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
        stdout=STDERR,  # NCCL prints, and standard output is for rank 0's answers
        start_new_session=True,  # only rank 0 gets a terminal's Ctrl-C
    )
    theirs.close()
    return _Process(rank, child, ours)


def _python() -> str:
    """Return the Python interpreter; in a server that embeds Python, sys.executable is the server."""
    if Path(sys.executable or "").name.startswith("python"):
        return sys.executable
    return str(Path(sysconfig.get_config_var("BINDIR")) / f"python{sysconfig.get_python_version()}")


def _ending(child: subprocess.Popen) -> str:
    try:
        code = child.wait(5)
    except subprocess.TimeoutExpired:
        return "its pipe is closed"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main(pipe: Connection, rank: int, ranks: int, port: int) -> None:
    """Run one rank: open the engine that comes through the pipe, then make the calls that follow."""
    messages: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, messages), daemon=True).start()
    try:
        import torch.distributed as dist

        from echo_trt.backends.parallel.rank_group import HOST, join

        pipe.send(HERE)
        open_rank, patience = messages.get()

        def loaded() -> None:
            pipe.send(LOADED)
            messages.get()  # once all ranks have sent it

        engine = open_rank(join(dist.TCPStore(HOST, port, ranks), rank, ranks, patience, loaded))
        pipe.send(READY)
        while True:
            method, arguments, inputs = messages.get()
            getattr(engine, method)(*arguments, **inputs)
    except UserError as error:
        pipe.send(Failed(str(error)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(Failed(f"rank {rank} of {ranks} failed ({described(error)})"))
    os._exit(1)  # an ordinary exit could wait for a broken group


def _receive(pipe: Connection, messages: queue.SimpleQueue) -> None:
    """Queue the pipe's messages, and end this process when rank 0 ends."""
    while True:
        try:
            messages.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    from echo_trt.backends.parallel import rank_processes

    descriptor, own_rank, all_ranks, store_port = map(int, sys.argv[1:])
    rank_processes.main(Connection(descriptor), own_rank, all_ranks, store_port)
