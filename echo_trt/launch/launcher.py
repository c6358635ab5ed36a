"""``echo-trt serve``: starts Triton and the gateway, supervises them, and finishes open answers at the end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from echo_trt.bundle.manifest import Manifest, read_manifest
from echo_trt.decoding.policies import policy_named
from echo_trt.errors import UserError
from echo_trt.gateway.keys import Keys
from echo_trt.gateway.options import checked_names, checked_origins
from echo_trt.launch.probe import PROBE_SECONDS, Probe, responds
from echo_trt.launch.process import Log, Process, lives, raise_open_files
from echo_trt.launch.stopping import stop_signals
from echo_trt.launch.supervised import Supervised, port_trouble
from echo_trt.launch.triton_server import Ports, TritonServer, find_server, own_prefix, remove_folders, remove_regions
from echo_trt.runtime.params import MOST_AT_ONCE
from echo_trt.serving.protocol import MODEL

CHECK_SECONDS = 0.25  # between two checks of the processes; larger: a failure is noticed later
REAP_SECONDS = 5.0  # for Triton to reap a backend that ends in good order; larger: a dead backend is noticed later
GATEWAY_SECONDS = 30.0  # for an answer among thousands of streams; larger: a hang is noticed later
FLUSH_SECONDS, STOP_SECONDS = 0.5, 10.0  # for Triton to send the last tokens, and to stop; larger: a slower end


@dataclass(frozen=True)
class Job:
    """What the command was asked to do.

    ``openai_port`` 0: no gateway. None stands for the recipe's own, no ``served_model_names`` for the default.
    ``kv_cache_memory``: bytes of the KV pool.
    """

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
    special_tokens_in_content: bool = False
    served_model_names: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    page: bool = True
    kv_cache_memory: int | None = None
    policy_file: Path | None = None

    @property
    def reached_at(self) -> str:
        """The address for clients on this machine."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def run(job: Job) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit code: 0 where all answers were finished.

    Raises UserError for wrong options, and for a process that does not start or dies repeatedly.
    """
    job = replace(job, host=_address(job.host))
    manifest = _check(job)
    names = job.served_model_names or (MODEL, manifest.recipe.target.hub or manifest.name)
    job = replace(job, served_model_names=checked_names(names))
    server = find_server()
    stop = threading.Event()
    for number in (signal.SIGINT, *stop_signals()):
        signal.signal(number, lambda *_: stop.set())
    raise_open_files()
    remove_folders(Path(tempfile.gettempdir()))
    log = Log(sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY))
    try:
        with tempfile.TemporaryDirectory(prefix=own_prefix()) as work:
            return Launcher(job, server, Path(work), stop, log).run()
    finally:
        log.close()


def _check(job: Job) -> Manifest:
    """Returns the bundle's. Raises UserError."""
    manifest = read_manifest(job.bundle)
    if job.policy:
        policy_named(job.policy, "--policy")
    ports = {
        "--http-port": job.http_port,
        "--grpc-port": job.grpc_port,
        "--metrics-port": job.metrics_port,
        "--openai-port": job.openai_port,
    }
    wanted = {option: port for option, port in ports.items() if port}
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"{', '.join(map(str, wanted.values()))} are the ports asked for; give each a port of its own.")
    for option, port in wanted.items():
        if trouble := port_trouble(option, job.host, port):
            raise UserError(f"{trouble}.")
    if job.batch is not None and not 1 <= job.batch <= MOST_AT_ONCE:
        raise UserError(f"--batch is {job.batch}; give a whole number from 1 to {MOST_AT_ONCE}.")
    if job.api_keys and not job.api_keys.is_file():
        raise UserError(f"--api-keys-file is {job.api_keys}, which is no file; name one with a key a line.")
    if job.api_keys:
        Keys(job.api_keys)  # refuses what the gateway would, before Triton starts
    checked_origins(job.allowed_origins)
    return manifest


def _address(host: str) -> str:
    """Resolve a host: Triton takes IPv4 addresses alone, and reads names such as localhost as 255.255.255.255."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a name with an empty or an endless part
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise UserError(
            f"--host is {host!r}, which is no IPv4 address and has none ({reason}); give one, such as 0.0.0.0."
        ) from None


class Triton(Supervised):
    """Triton's process, which serves once a real inference was answered."""

    name = "Triton"

    def __init__(self, job: Job, server: TritonServer, work: Path, log: Log):
        ports = {"--http-port": job.http_port, "--grpc-port": job.grpc_port, "--metrics-port": job.metrics_port}
        super().__init__(log, job.host, ports, job.start_seconds)
        self.signals = work
        self._job, self._server, self._work = job, server, work
        self._probe = Probe(job.reached_at, job.http_port, job.metrics_port)
        self._backends: set[int] = set()
        self._starts, self._sound = 0, 0.0  # _sound: last time.monotonic() without a dead backend

    def _spawn(self) -> Process:
        job = self._job
        remove_regions()
        settings = {"ECHO_TRT_BUNDLE": str(job.bundle.resolve()), "ECHO_TRT_QUEUE": str(job.queue)}
        settings |= {"ECHO_TRT_POLICY": job.policy} if job.policy else {}
        settings |= {"ECHO_TRT_POLICY_FILE": str(job.policy_file.resolve())} if job.policy_file else {}
        settings |= {"ECHO_TRT_BATCH": str(job.batch)} if job.batch else {}
        settings |= {"ECHO_TRT_KV_CACHE_MEMORY": f"{job.kv_cache_memory}B"} if job.kv_cache_memory else {}
        settings["ECHO_TRT_SPECIAL_TOKENS_IN_CONTENT"] = str(job.special_tokens_in_content).lower()
        self._starts += 1
        self._sound = time.monotonic()
        self.signals = work = self._work / str(self._starts)
        work.mkdir()
        settings["ECHO_TRT_SIGNALS"] = str(work)
        command = self._server.command(job.host, Ports(job.http_port, job.grpc_port, job.metrics_port), work)
        return Process("triton", command, self._server.environment(settings), self._log)

    def _ready(self) -> bool:
        answered = self._probe.answers(PROBE_SECONDS)
        self._backends = self.process.children()
        return answered

    def _lives(self) -> bool:
        return self._probe.lives()

    def _trouble(self) -> str | None:
        """Find a dead backend, which Triton does not notice: open requests and its start would hang."""
        if trouble := super()._trouble():
            return trouble
        now, backends = time.monotonic(), self._backends if self.serving else self.process.children()
        if all(map(lives, backends)):
            self._sound = now
        elif self.serving:
            return "Triton's backend has died"
        elif now - self._sound > REAP_SECONDS:
            return "Triton's backend died while it loaded the bundle, as it does for want of memory; free some"
        return None


class Gateway(Supervised):
    """The gateway's process, which serves once it answers by itself, without Triton."""

    name = "the gateway"

    def __init__(self, job: Job, log: Log):
        super().__init__(log, job.host, {"--openai-port": job.openai_port}, job.start_seconds)
        self._job, self._url = job, f"http://{job.reached_at}:{job.openai_port}/version"

    def _spawn(self) -> Process:
        job = self._job
        words = ["--grpc-url", f"{job.reached_at}:{job.grpc_port}", "--model", MODEL, "--host", job.host]
        words += ["--port", str(job.openai_port), "--drain-seconds", str(job.drain_seconds)]
        words += ["--metrics-url", f"http://{job.reached_at}:{job.metrics_port}/metrics"]
        words += ["--api-keys-file", str(job.api_keys)] if job.api_keys else []
        words += [f"--served-model-name={name}" for name in job.served_model_names]
        words += [f"--allowed-origins={origin}" for origin in job.allowed_origins]
        words += [] if job.page else ["--no-page"]
        return Process("gateway", [sys.executable, "-m", "echo_trt.gateway", *words], dict(os.environ), self._log)

    def _ready(self) -> bool:
        return responds(self._url, 1)

    def _lives(self) -> bool:
        return responds(self._url, GATEWAY_SECONDS)


class Launcher:
    """Triton and the gateway as one service, which is started, supervised and drained."""

    def __init__(self, job: Job, server: TritonServer, work: Path, stop: threading.Event, log: Log):
        self.job, self._stop, self._log = job, stop, log
        self._triton = Triton(job, server, work, log)
        self._gateway = Gateway(job, log) if job.openai_port else None
        self._announced = False

    def run(self) -> int:
        """Run until ``stop`` is set; returns the exit code, 1 where open answers were lost.

        Raises UserError when it gives up.
        """
        try:
            while not self._stop.wait(CHECK_SECONDS):
                self._step()
            return self._drain()
        except UserError:
            self._drain()  # if the gateway failed, Triton still has open answers
            raise
        finally:
            for process in filter(None, (self._gateway, self._triton)):
                process.stop()
            remove_regions()

    def _step(self) -> None:
        self._triton.step()
        if self._gateway and self._triton.served:
            self._gateway.step()
        if not self._announced and self._triton.serving and (self._gateway is None or self._gateway.serving):
            self._announced = True
            self._print_urls()

    def _print_urls(self) -> None:
        job = self.job
        lines = [
            f"HTTP     http://{job.host}:{job.http_port}/v2/models/{MODEL}/generate_stream",
            f"gRPC     {job.host}:{job.grpc_port}",
            f"metrics  http://{job.host}:{job.metrics_port}/metrics",
        ]
        lines += [f"OpenAI   http://{job.host}:{job.openai_port}/v1"] if job.openai_port else []
        lines += [f"page     http://{job.host}:{job.openai_port}/"] if job.openai_port and job.page else []
        self._log.say("\n".join(["serving", *lines]))

    def _drain(self) -> int:
        """Let model and gateway refuse new requests and finish open ones; then stop Triton, which is idle."""
        if not self._triton.serving:  # nothing is open
            return 0
        self._log.say("stopping; open answers are finished")
        end = time.monotonic() + self.job.drain_seconds
        triton, gateway = self._triton.process, self._gateway and self._gateway.process
        drained = self._triton.signals / "drained"
        (self._triton.signals / "drain").touch()
        if gateway:
            gateway.terminate()
        while triton.alive and not drained.exists() and time.monotonic() < end:
            time.sleep(0.05)
        finished = drained.exists() and (gateway is None or gateway.wait(end - time.monotonic()))
        if finished:
            time.sleep(FLUSH_SECONDS)
            triton.terminate()
            triton.wait(STOP_SECONDS)
        else:
            late = f"not finished in {self.job.drain_seconds} s"
            fate = late if triton.alive else "lost with Triton, which died"
            self._log.say(f"open answers were {fate}")
        return 0 if finished else 1
