"""``echo-trt serve --replicas N``: Dynamo's frontend and N workers on this machine, supervised and drained as one."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException

from echo_trt.bundle.card import check_card
from echo_trt.bundle.manifest import read_manifest
from echo_trt.decoding.policies import policy_named
from echo_trt.dynamo.devices import divided, visible_devices
from echo_trt.dynamo.discovery import FOLDER
from echo_trt.dynamo.environment import completed
from echo_trt.dynamo.installed import check_installed
from echo_trt.errors import UserError
from echo_trt.launch.options import ServeOptions
from echo_trt.launch.probe import Probe, open_directly, responds
from echo_trt.launch.process import Log, Process, raise_open_files
from echo_trt.launch.stopping import stop_signals
from echo_trt.launch.supervised import Supervised, port_trouble
from echo_trt.runtime.kv_pool import kv_pool, on_cpu

CHECK_SECONDS = 0.25  # between two checks of the processes; larger: a failure is noticed later
ANSWER_SECONDS = 30.0  # seconds for a busy process to answer; larger: a hang is noticed later
LOST_SECONDS = 15.0  # seconds that a frontend may list no worker while one serves; larger: requests are refused longer
STOP_SECONDS = 10.0  # seconds for a process without open requests to stop; larger: a slower end
QUIET = "warn,tower_http=off"  # DYN_LOG: without the probes that a starting worker answers with 503
#: Of the frontend, where the user has not set them.
SETTINGS = {
    "DYN_ROUTER_MODE": "kv",
    "DYN_MIGRATION_LIMIT": "3",  # times that an answer goes on elsewhere; larger: survives more deaths in a row
    # Milliseconds that a stream waits for a refusal, so that it has a status of its own; larger: later headers.
    "DYN_HTTP_PRE_COMMIT_ERROR_PEEK_MS": "50",
}
PORTS = range(20_000, 32_000)  # of workers' metrics and health
LOOPBACK = "127.0.0.1"


def run(job: ServeOptions) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit code: 0 where all answers were finished.

    Raises UserError for wrong options, and for a process that does not start or dies repeatedly.
    """
    _refuse_others(job)
    manifest = read_manifest(job.bundle)
    if job.policy:
        policy_named(job.policy, "--policy")
    check_card(job.bundle)
    if trouble := port_trouble("--openai-port", job.host, job.openai_port):
        raise UserError(f"{trouble}.")
    check_installed()
    job = replace(job, bundle=job.bundle.resolve())
    if on_cpu(manifest.engine) and manifest.recipe.limits.kv_blocks is None:  # each would take what is there for all
        pool = kv_pool(job.bundle, manifest, job.batch, job.kv_cache_memory, job.replicas)
        job = replace(job, kv_cache_memory=pool.bytes)
    stop = threading.Event()
    for number in (signal.SIGINT, *stop_signals()):
        signal.signal(number, lambda *_: stop.set())
    raise_open_files()
    log = Log(sys.stderr.fileno() if sys.stderr else os.open(os.devnull, os.O_WRONLY))
    try:
        with tempfile.TemporaryDirectory(prefix="echo-trt-dynamo-") as folder:
            return Replicas(job, completed({FOLDER: folder, "DYN_LOG": QUIET} | os.environ), stop, log).run()
    finally:
        log.close()


def _refuse_others(job: ServeOptions) -> None:
    """Refuse options that only Triton and the gateway have."""
    for option, given in (
        ("--api-keys-file", job.api_keys),
        ("--allowed-origins", job.allowed_origins),
        ("--special-tokens-in-content", job.special_tokens_in_content),
        ("a second --served-model-name", job.served_model_names[1:]),
        ("--openai-port 0", job.openai_port == 0),
        ("--no-page", not job.page),
        ("--no-triton", not job.triton),
        *((option, True) for option in job.given_triton_ports),
    ):
        if given:
            raise UserError(f"{option} has no meaning with --replicas; leave it out.")


class Frontend(Supervised):
    """Dynamo's OpenAI frontend and router."""

    name = "Dynamo's frontend"

    def __init__(self, job: ServeOptions, environment: dict[str, str], log: Log, workers: Sequence[Replica]):
        super().__init__(log, job.host, {"--openai-port": job.openai_port}, job.start_seconds)
        self._job, self._workers = job, workers
        self._told: Process | None = None  # which one was told to end
        self._environment = SETTINGS | environment
        self._environment["DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"] = str(job.drain_seconds)

    def _spawn(self) -> Process:
        words = ["--http-host", self._job.host, "--http-port", str(self._job.openai_port)]
        command = [sys.executable, "-m", "dynamo.frontend", *words]
        return Process("frontend", command, self._environment, self._log)

    def _ready(self) -> bool:
        return responds(f"{self._job.openai_url}/live", 1)

    def _lives(self) -> bool:
        """Return whether it answers. One that lost its workers, as a removed folder of entries does, is told to end."""
        end = time.monotonic() + LOST_SECONDS
        while alive := responds(f"{self._job.openai_url}/live", ANSWER_SECONDS):
            served = any(worker.serving for worker in self._workers)
            if self.lists(self._job.model_name) or not served or self._told is self.process:
                break
            if time.monotonic() > end and self.process:
                self._log.say(f"{self.name} has lost its workers; it ends once open answers have")
                self._told = self.process
                self.process.terminate()
                break
            time.sleep(1)
        return alive

    def lists(self, model: str) -> bool:
        """Return whether it would send requests for a model to a worker."""
        try:
            with open_directly(f"{self._job.openai_url}/v1/models", timeout=1) as reply:
                return any(each["id"] == model for each in json.load(reply)["data"])
        except (OSError, ValueError, LookupError, TypeError, HTTPException):  # or it says something else
            return False


class Replica(Supervised):
    """A worker, which serves once a real pass was answered."""

    def __init__(self, number: int, port: int, job: ServeOptions, environment: dict[str, str], log: Log):
        """``port``: of its metrics and health."""
        self.name, self._job, self._environment = f"worker {number}", job, environment
        self._port = port
        super().__init__(log, LOOPBACK, {f"system port of worker {number}": self._port}, job.start_seconds)
        self._url = f"http://{LOOPBACK}:{self._port}/health"
        self._probe = Probe(LOOPBACK, 0, self._port)  # reads its metrics alone

    def _spawn(self) -> Process:
        job = self._job
        words = [str(job.bundle), "--name", job.model_name, "--queue", str(job.queue)]
        words += ["--system-port", str(self._port), "--drain-timeout", str(job.drain_seconds)]
        words += ["--policy-file", str(job.policy_file)] if job.policy_file else []
        words += ["--policy", job.policy] if job.policy else []
        words += ["--batch", str(job.batch)] if job.batch else []
        words += ["--kv-cache-memory", f"{job.kv_cache_memory}B"] if job.kv_cache_memory else []
        command = [sys.executable, "-m", "echo_trt", "worker", *words]
        return Process(self.name.replace(" ", "-"), command, self._environment, self._log)

    def _ready(self) -> bool:
        return responds(self._url, 1)

    def _lives(self) -> bool:
        """Return whether a pass was answered, or the engine still iterates: a slow one is not ready, but no failure."""
        end = time.monotonic() + ANSWER_SECONDS
        self._probe.progresses()
        while not (responds(self._url, 2) or self._probe.progresses()):
            if time.monotonic() > end:
                return False
            time.sleep(1)
        return True


class Replicas:
    """The frontend and its workers, which are started, supervised and drained."""

    def __init__(self, job: ServeOptions, environment: dict[str, str], stop: threading.Event, log: Log):
        self._job, self._stop, self._log = job, stop, log
        manifest = read_manifest(job.bundle)
        visible = visible_devices(manifest.engine, environment)
        own = divided(visible, job.replicas, manifest.recipe.tensor_parallel)
        ports = zip(free_ports(job.replicas, job.openai_port), own, strict=True)
        self._workers = [
            Replica(number, port, job, environment | devices, log) for number, (port, devices) in enumerate(ports, 1)
        ]
        self._frontend = Frontend(job, environment, log, self._workers)
        self._announced = False

    def run(self) -> int:
        """Run until ``stop`` is set; returns the exit code, 1 where open answers were lost.

        Raises UserError when it gives up.
        """
        try:
            while not self._stop.wait(CHECK_SECONDS):
                for process in (self._frontend, *self._workers):
                    process.step()
                self._announce()
            return self._drain()
        finally:
            for process in (self._frontend, *self._workers):
                process.stop()

    def _announce(self) -> None:
        if self._announced or not all(process.serving for process in (self._frontend, *self._workers)):
            return
        if self._frontend.lists(self._job.model_name):
            self._announced = True
            url = f"http://{self._job.host}:{self._job.openai_port}/v1"
            self._log.say(f"serving\nOpenAI   {url}, model {self._job.model_name}\nworkers  {len(self._workers)}")

    def _drain(self) -> int:
        """Let the frontend finish what is open, then the workers."""
        if not self._frontend.serving:
            return 0
        self._log.say("stopping; open answers are finished")
        end = time.monotonic() + self._job.drain_seconds
        for process in (self._frontend, *self._workers):
            if process is self._workers[0]:
                end = max(end, time.monotonic() + STOP_SECONDS)
            if process.process:
                process.process.terminate()
            if process is self._frontend and not self._finished(end):
                self._log.say(f"open answers were not finished in {self._job.drain_seconds} s")
                return 1
        for worker in self._workers:
            if worker.process:
                worker.process.wait(end - time.monotonic())
        return 0

    def _finished(self, end: float) -> bool:
        process = self._frontend.process
        return process is None or process.wait(end - time.monotonic())


def free_ports(number: int, reserved: int) -> list[int]:
    """Choose ``number`` free ports other than ``reserved``, which the frontend will take.

    All ports are below the range that the system hands to clients, since Dynamo accepts no port of that range.
    """
    ports: set[int] = set()
    while len(ports) < number:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            ports |= {port} - {reserved}
    return sorted(ports)
