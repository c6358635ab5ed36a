"""``echo-trt serve``: starts Triton and the gateway, supervises them, and finishes open answers at the end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from echo_trt.bundle.manifest import Manifest, read_manifest
from echo_trt.decoding.policies import policy_named
from echo_trt.errors import UserError
from echo_trt.gateway.keys import Keys
from echo_trt.gateway.options import checked_names, checked_origins
from echo_trt.launch.options import ServeOptions
from echo_trt.launch.probe import PROBE_SECONDS, EngineProbe, Probe, responds
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


def run(job: ServeOptions) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit code: 0 where all answers were finished.

    Raises UserError for wrong options, and for a process that does not start or dies repeatedly.
    """
    job = replace(job, host=_address(job.host, socket.AF_INET if job.triton else socket.AF_UNSPEC))
    manifest = _check(job)
    names = job.served_model_names or (MODEL, manifest.recipe.target.hub or manifest.name)
    job = replace(job, served_model_names=checked_names(names))
    server = find_server() if job.triton else None
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


def _check(job: ServeOptions) -> Manifest:
    """Returns the bundle's. Raises UserError."""
    if job.given_triton_ports and not job.triton:
        raise UserError(
            f"{job.given_triton_ports[0]} is a port of Triton's, but --no-triton is given; leave one of them out."
        )
    manifest = read_manifest(job.bundle)
    if job.policy:
        policy_named(job.policy, "--policy")
    wanted = job.ports
    if not wanted:
        raise UserError(
            "--openai-port is 0 and --no-triton is given, so nothing would be served; leave one of them out."
        )
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


def _address(host: str, family: socket.AddressFamily) -> str:
    """Resolve a host. Triton takes IPv4 addresses alone, and reads names such as localhost as 255.255.255.255."""
    try:
        return str(socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:  # UnicodeError: a name with an empty or an endless part
        kind = "IPv4 address" if family == socket.AF_INET else "address"
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise UserError(
            f"--host is {host!r}, which is no {kind} and has none ({reason}); give one, such as 0.0.0.0."
        ) from None


class Triton(Supervised):
    """Triton's process, which serves once a real inference was answered."""

    name = "Triton"

    def __init__(self, job: ServeOptions, server: TritonServer, work: Path, log: Log):
        ports = job.triton_ports
        super().__init__(log, job.host, {f"--{name}-port": port for name, port in ports.items()}, job.start_seconds)
        self._signals, self.socket = work, work / "engine"
        self._job, self._server, self._work = job, server, work
        self._probe = Probe(job.reached_at, ports["http"], ports["metrics"])
        self._backends: set[int] = set()
        self._starts, self._sound = 0, 0.0  # _sound: last time.monotonic() without a dead backend

    def _spawn(self) -> Process:
        job = self._job
        remove_regions()
        self.socket.unlink(missing_ok=True)
        settings = {"ECHO_TRT_BUNDLE": str(job.bundle.resolve()), "ECHO_TRT_QUEUE": str(job.queue)}
        settings |= {"ECHO_TRT_POLICY": job.policy} if job.policy else {}
        settings |= {"ECHO_TRT_POLICY_FILE": str(job.policy_file.resolve())} if job.policy_file else {}
        settings |= {"ECHO_TRT_BATCH": str(job.batch)} if job.batch else {}
        settings |= {"ECHO_TRT_KV_CACHE_MEMORY": f"{job.kv_cache_memory}B"} if job.kv_cache_memory else {}
        settings["ECHO_TRT_SPECIAL_TOKENS_IN_CONTENT"] = str(job.special_tokens_in_content).lower()
        self._starts += 1
        self._sound = time.monotonic()
        self._signals = work = self._work / str(self._starts)
        work.mkdir()
        settings |= {"ECHO_TRT_SIGNALS": str(work), "ECHO_TRT_SOCKET": str(self.socket)}
        command = self._server.command(job.host, Ports(**job.triton_ports), work)
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

    def begin_to_drain(self) -> None:
        """Let the model refuse new requests and finish open ones."""
        (self._signals / "drain").touch()

    @property
    def drained(self) -> bool:
        """Whether all answers have been sent."""
        return (self._signals / "drained").exists()

    def end(self) -> None:
        """Stop Triton, which is idle."""
        time.sleep(FLUSH_SECONDS)
        self.process.terminate()
        self.process.wait(STOP_SECONDS)


class Engine(Supervised):
    """The engine's process without Triton, which serves once a real inference was answered."""

    name = "the engine"

    def __init__(self, job: ServeOptions, work: Path, log: Log):
        super().__init__(log, job.host, {}, job.start_seconds)
        self.socket = work / "engine"
        self._job, self._probe = job, EngineProbe(self.socket)

    def _spawn(self) -> Process:
        job = self._job
        self.socket.unlink(missing_ok=True)
        words = ["--bundle", str(job.bundle.resolve()), "--socket", str(self.socket), "--queue", str(job.queue)]
        words += ["--policy", job.policy] if job.policy else []
        words += ["--policy-file", str(job.policy_file.resolve())] if job.policy_file else []
        words += ["--batch", str(job.batch)] if job.batch else []
        words += ["--kv-cache-memory", str(job.kv_cache_memory)] if job.kv_cache_memory else []
        words += ["--special-tokens-in-content"] if job.special_tokens_in_content else []
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        return Process("engine", [sys.executable, "-m", "echo_trt.serving", *words], environment, self._log)

    def _ready(self) -> bool:
        return self.socket.exists() and self._probe.answers(PROBE_SECONDS)

    def _lives(self) -> bool:
        return self._probe.lives()

    def begin_to_drain(self) -> None:
        """Let the engine refuse new requests; it ends once all answers have been sent."""
        self.process.terminate()

    @property
    def drained(self) -> bool:
        """Whether all answers have been sent."""
        return not self.process.alive and self.process.exit_code == 0

    def end(self) -> None:
        """Do nothing: the engine has ended by itself."""


class Gateway(Supervised):
    """The gateway's process, which serves once it answers by itself, without Triton."""

    name = "the gateway"

    def __init__(self, job: ServeOptions, log: Log, engine: Path):
        """``engine``: the socket that the engine's host listens on."""
        super().__init__(log, job.host, {"--openai-port": job.openai_port}, job.start_seconds)
        self._job, self._engine = job, engine
        self._url = f"{job.openai_url}/version"

    def _spawn(self) -> Process:
        job = self._job
        words = ["--model", MODEL, "--host", job.host, "--engine-socket", str(self._engine)]
        words += ["--port", str(job.openai_port), "--drain-seconds", str(job.drain_seconds)]
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
    """Engine and gateway as one service, which is started, supervised and drained."""

    def __init__(self, job: ServeOptions, server: TritonServer | None, work: Path, stop: threading.Event, log: Log):
        self.job, self._stop, self._log = job, stop, log
        self._engine = Triton(job, server, work, log) if server else Engine(job, work, log)
        self._gateway = Gateway(job, log, self._engine.socket) if job.openai_port else None
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
            self._drain()  # if the gateway failed, the engine still has open answers
            raise
        finally:
            for process in filter(None, (self._gateway, self._engine)):
                process.stop()
            remove_regions()

    def _step(self) -> None:
        self._engine.step()
        if self._gateway and self._engine.served:
            self._gateway.step()
        if not self._announced and self._engine.serving and (self._gateway is None or self._gateway.serving):
            self._announced = True
            self._print_urls()

    def _print_urls(self) -> None:
        job, host, ports = self.job, self.job.shown_host, self.job.triton_ports
        lines = [
            f"HTTP     http://{host}:{ports['http']}/v2/models/{MODEL}/generate_stream",
            f"gRPC     {host}:{ports['grpc']}",
        ]
        metrics = ports["metrics"] if job.triton else job.openai_port
        lines = [*(lines if job.triton else ()), f"metrics  http://{host}:{metrics}/metrics"]
        lines += [f"OpenAI   http://{host}:{job.openai_port}/v1"] if job.openai_port else []
        lines += [f"page     http://{host}:{job.openai_port}/"] if job.openai_port and job.page else []
        self._log.say("\n".join(["serving", *lines]))

    def _drain(self) -> int:
        """Let engine and gateway refuse new requests and finish open ones; then stop the engine, which is idle."""
        engine, gateway = self._engine, self._gateway and self._gateway.process
        if not engine.serving:  # nothing is open
            return 0
        self._log.say("stopping; open answers are finished")
        end = time.monotonic() + self.job.drain_seconds
        engine.begin_to_drain()
        if gateway:
            gateway.terminate()
        while engine.process.alive and not engine.drained and time.monotonic() < end:
            time.sleep(0.05)
        finished = engine.drained and (gateway is None or gateway.wait(end - time.monotonic()))
        if finished:
            engine.end()
        else:
            late = f"not finished in {self.job.drain_seconds} s"
            fate = late if engine.process.alive else f"lost with {engine.name}, which died"
            self._log.say(f"open answers were {fate}")
        return 0 if finished else 1
