"""``echo-trt serve``: starts Triton and the gateway, looks after them, and lets open answers finish at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from echo_trt.bundle import read_manifest
from echo_trt.errors import UserError
from echo_trt.gateway.keys import Keys
from echo_trt.runtime.params import MOST_AT_ONCE
from echo_trt.serving.probe import PROBE_SECONDS, Probe, Watch
from echo_trt.serving.triton_server import (
    MODEL,
    Ports,
    TritonServer,
    find_server,
    own_prefix,
    remove_folders,
    remove_regions,
)

#: What Triton complains about where there is no GPU; where there is one, it means what it says.
HARMLESS = () if Path("/proc/driver/nvidia").exists() else ("cuda", "dcgm", "nvml")
_LIBC = ctypes.CDLL(None)
STACK = 512 * 2**20  # bytes a thread, taken as used: Triton 2.51 parses JSON by recursion, 170 bytes a bracket
LOOK = 0.5  # seconds between two looks at the processes
FLUSH_SECONDS, STOP_SECONDS = 0.5, 10.0  # for Triton to hand out what it was given; to stop
MOST_RESTARTS, RESTARTS_WITHIN = 5, 300.0  # seconds


@dataclass(frozen=True)
class Job:
    """What the command was asked to do. ``openai_port`` 0: no gateway. None stands for the recipe's own."""

    bundle: Path
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int = 9000
    api_keys: Path | None = None
    policy: str | None = None
    batch: int | None = None
    queue: int = 256
    start_seconds: int = 300
    drain_seconds: int = 60


class Process:
    """A child that does not outlive this process; its last lines are kept, and shown as they come."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str]):
        self.name = name
        self.lines: deque[str] = deque(maxlen=200)
        self._child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is the launcher's to handle
            preexec_fn=_prepare,
        )
        threading.Thread(target=self._relay, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def children(self) -> set[int]:
        """Process ids of what it started, directly."""
        found: set[int] = set()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(OSError):  # threads come and go
                    found.update(map(int, (task / "children").read_text().split()))
        return found

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

    def _relay(self) -> None:
        for raw in self._child.stdout:
            line = raw.decode(errors="replace").rstrip()
            self.lines.append(line)
            if line and not _is_harmless(line):
                print(f"{self.name}: {line}", file=sys.stderr, flush=True)


def _lives(pid: int) -> bool:
    """Triton never waits for a backend that has died, so it stays as a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def _prepare() -> None:
    """In a child, before it becomes what it will be."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK if most == resource.RLIM_INFINITY else min(STACK, most)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, most))


def run(job: Job, messages: Console) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 0 where all answers were finished."""
    _check(job)
    server = find_server()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    remove_folders(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=own_prefix()) as work:
        return Launcher(job, server, Path(work), stop, messages).run()


def _check(job: Job) -> None:
    read_manifest(job.bundle)
    ports = {
        "--http-port": job.http_port,
        "--grpc-port": job.grpc_port,
        "--metrics-port": job.metrics_port,
        "--openai-port": job.openai_port,
    }
    asked = {option: port for option, port in ports.items() if port}
    if len(set(asked.values())) < len(asked):
        raise UserError(f"{', '.join(map(str, asked.values()))} are the ports asked for; give each a port of its own.")
    for option, port in asked.items():
        _check_port(option, job.host, port)
    if job.batch is not None and not 1 <= job.batch <= MOST_AT_ONCE:
        raise UserError(f"--batch is {job.batch}; give a whole number from 1 to {MOST_AT_ONCE}.")
    if job.api_keys and not job.api_keys.is_file():
        raise UserError(f"--api-keys is {job.api_keys}, which is no file; name one with a key a line.")
    if job.api_keys:
        Keys(job.api_keys)  # refuses what the gateway would, before Triton starts


def _check_port(option: str, host: str, port: int) -> None:
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
    except OSError as error:
        raise UserError(
            f"--host is {host!r}, which is no IPv4 address and has none ({error.strerror}); give one, such as 0.0.0.0."
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"{option} {port} on {host} cannot be used ({error.strerror}); give another port."
            ) from None


class Launcher:
    """Triton and the gateway as one service: started, watched, started again where they die, drained at the end."""

    def __init__(self, job: Job, server: TritonServer, work: Path, stop: threading.Event, messages: Console):
        self.job, self.server, self.work, self._stop, self._messages = job, server, work, stop, messages
        self._local = "127.0.0.1" if job.host == "0.0.0.0" else job.host
        self._watch: Watch | None = None
        self._probe = Probe(self._local, job.http_port, job.metrics_port)
        self._triton: Process | None = None
        self._gateway: Process | None = None
        self._backends: set[int] = set()
        self._restarts: deque[float] = deque()
        self._starts, self._signals = 0, work

    def run(self) -> int:
        """Until ``stop`` is set; the exit code, 1 where open answers were lost."""
        try:
            remove_regions()
            self._start_triton()
            if not self._stop.is_set():
                self._start_gateway()
                self._print_urls()
            while not self._stop.wait(LOOK):
                self._look_after()
            return self._drain()
        finally:
            for process in (self._gateway, self._triton):
                if process:
                    process.kill()
            remove_regions()

    # -- starting --------------------------------------------------------------------------------------------------

    def _start_triton(self) -> None:
        """Returns when a real inference has come back."""
        job = self.job
        ports = Ports(job.http_port, job.grpc_port, job.metrics_port)
        settings = {"ECHO_TRT_BUNDLE": str(job.bundle.resolve()), "ECHO_TRT_QUEUE": str(job.queue)}
        settings |= {"ECHO_TRT_POLICY": job.policy} if job.policy else {}
        settings |= {"ECHO_TRT_BATCH": str(job.batch)} if job.batch else {}
        self._starts += 1
        self._signals = work = self.work / str(self._starts)
        work.mkdir()
        settings["ECHO_TRT_SIGNALS"] = str(work)
        command = self.server.command(job.host, ports, work)
        self._triton = Process("triton", command, self.server.environment(settings))
        end = time.monotonic() + job.start_seconds
        while not self._probe.answers(PROBE_SECONDS):
            if self._stop.is_set():
                return
            if not self._triton.alive:
                raise UserError(f"Triton did not start: {_reason(self._triton.lines)}.")
            if time.monotonic() > end:
                raise UserError(
                    f"Triton gave no answer in {job.start_seconds} s; raise --start-timeout, or see the lines above."
                )
            time.sleep(0.2)
        self._backends = self._triton.children()
        self._watch = Watch(self._probe)

    def _start_gateway(self) -> None:
        job = self.job
        if not job.openai_port:
            return
        words = ["--grpc-url", f"{self._local}:{job.grpc_port}", "--model", MODEL, "--host", job.host]
        words += ["--port", str(job.openai_port), "--drain-seconds", str(job.drain_seconds)]
        words += ["--api-keys-file", str(job.api_keys)] if job.api_keys else []
        self._gateway = Process("gateway", [sys.executable, "-m", "echo_trt.gateway", *words], dict(os.environ))
        end = time.monotonic() + job.start_seconds
        while not _listens(self._local, job.openai_port):
            if self._stop.is_set():
                return
            if not self._gateway.alive:
                raise UserError(f"the gateway did not start: {_reason(self._gateway.lines)}.")
            if time.monotonic() > end:
                raise UserError(f"the gateway does not listen after {job.start_seconds} s; see the lines above.")
            time.sleep(0.1)

    def _print_urls(self) -> None:
        job = self.job
        lines = [
            f"HTTP     http://{job.host}:{job.http_port}/v2/models/{MODEL}/generate_stream",
            f"gRPC     {job.host}:{job.grpc_port}",
            f"metrics  http://{job.host}:{job.metrics_port}/metrics",
        ]
        lines += [f"OpenAI   http://{job.host}:{job.openai_port}/v1"] if job.openai_port else []
        self._messages.print("\n".join(["serving", *lines]), highlight=False, soft_wrap=True)

    # -- while it runs ---------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        if self._gateway and not self._gateway.alive:
            self._restart("the gateway has died", self._gateway, self._start_gateway)
        if not self._triton.alive:
            self._restart("Triton has died", self._triton, self._start_triton)
        elif not all(map(_lives, self._backends)):
            # Triton itself would not notice, and its open requests would hang: with the server their connections end.
            self._restart("Triton's backend has died", self._triton, self._start_triton)
        elif self._watch and self._watch.silent:
            self._restart("Triton does not answer", self._triton, self._start_triton)

    def _restart(self, what: str, process: Process, start) -> None:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTARTS_WITHIN:
            self._restarts.popleft()
        if len(self._restarts) >= MOST_RESTARTS:
            raise UserError(f"{what}, and {MOST_RESTARTS} restarts in {RESTARTS_WITHIN:.0f} s were no cure.")
        self._restarts.append(now)
        self._messages.print(f"{what}; starting it again", highlight=False)
        process.kill()
        if process is self._triton:
            if self._watch:
                self._watch.stop()
            self._watch = None
            remove_regions()
        start()
        self._messages.print(f"serving again after {time.monotonic() - now:.1f} s", highlight=False)

    # -- stopping --------------------------------------------------------------------------------------------------

    def _drain(self) -> int:
        """The model and the gateway refuse what is new and finish what is open; then Triton, idle, is stopped."""
        if self._watch is None:  # Triton has not answered since its start, so nothing is open
            return 0
        self._messages.print("stopping; open answers are finished", highlight=False)
        end = time.monotonic() + self.job.drain_seconds
        (self._signals / "drain").touch()
        if self._gateway:
            self._gateway.terminate()
        drained = self._signals / "drained"
        while self._triton.alive and not drained.exists() and time.monotonic() < end:
            time.sleep(0.05)
        finished = drained.exists() and (self._gateway is None or self._gateway.wait(end - time.monotonic()))
        if finished:
            time.sleep(FLUSH_SECONDS)
            self._triton.terminate()
            self._triton.wait(STOP_SECONDS)
        else:
            late = f"not finished in {self.job.drain_seconds} s"
            fate = late if self._triton.alive else "lost with Triton, which died"
            self._messages.print(f"open answers were {fate}", highlight=False)
        return 0 if finished else 1


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def _is_harmless(line: str) -> bool:
    return any(word in line.lower() for word in HARMLESS)


def _reason(lines: deque[str]) -> str:
    """The line that tells most of a failed start."""
    told = [line for line in lines if line.strip() and not _is_harmless(line)]
    errors = [line for line in told if "UserError" in line or "error:" in line or "Error" in line]
    line = (errors or told or ["it said nothing"])[0 if errors else -1]
    for mark in ("UserError: ", "error: "):
        line = line.split(mark, 1)[-1]
    line = line.split(r"\n\nAt:", 1)[0]  # Triton prints a model's error with its Python frames, on one line
    return " ".join(line.split()).rstrip(".")[:400]
