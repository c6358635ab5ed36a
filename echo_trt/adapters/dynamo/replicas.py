"""``echo-trt serve --replicas N``: Dynamo's frontend and N workers on this machine, supervised and drained as one."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from echo_trt.adapters.dynamo.discovery import FOLDER
from echo_trt.adapters.dynamo.environment import check_installed, completed
from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.card import check_card
from echo_trt.bundle.manifest import read_manifest
from echo_trt.engine.kv_pool import kv_pool
from echo_trt.errors import UserError
from echo_trt.speculation.policies import policy_named
from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.probe import METRICS_SECONDS, got, iterations, responds
from echo_trt.supervision.process import Process, ProcessLog
from echo_trt.supervision.supervised import ANSWER_SECONDS, Supervised, Supervisor, port_trouble, supervise

LOST_SECONDS = 15.0  # seconds that a frontend may list no worker while one serves; larger: requests are refused longer
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
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def run(job: ServeOptions) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit code: 0 where all answers were finished.

    Raises UserError for wrong options, and StartFailed for a process that does not start.
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
    shared = engine_kind(manifest.engine).on_host
    if shared and manifest.recipe.limits.kv_blocks is None:  # each would take what is there for all
        pool = kv_pool(job.bundle, manifest, job.batch, job.kv_cache_memory, job.replicas)
        job = replace(job, kv_cache_memory=pool.bytes)
    settings = {"DYN_LOG": QUIET} | os.environ
    return supervise(
        "echo-trt-dynamo-",
        job.log_format,
        lambda folder, *given: replicas(job.keeping_costs(folder), completed({FOLDER: str(folder)} | settings), *given),
    )


def _refuse_others(job: ServeOptions) -> None:
    """Refuse options that have no meaning for Dynamo. Raises UserError."""
    for option, given in (
        ("--api-keys-file", job.api_keys),
        ("--allowed-origins", job.allowed_origins),
        ("--allowed-hosts", job.allowed_hosts),
        ("--special-tokens-in-content", job.special_tokens_in_content),
        ("--no-prefix-cache", job.no_prefix_cache),
        ("--kv-events-config", job.kv_events_config),
        ("--learn-answers", job.learn_answers),
        ("--store", job.store),
        ("a second --served-model-name", job.served_model_names[1:]),
        ("--served-model-name *", "*" in job.served_model_names),
        ("--strict-fields", job.strict_fields),
        ("--openai-port 0", job.openai_port == 0),
        ("--no-page", not job.page),
        ("--no-request-log", not job.request_log),
        ("--triton", job.triton),
        *((option, True) for option in job.given_triton_ports),
    ):
        if given:
            raise UserError(f"{option} has no meaning with --replicas; leave it out.")


class Frontend(Supervised):
    """Dynamo's OpenAI frontend and router."""

    name = "Dynamo's frontend"

    def __init__(
        self, job: ServeOptions, environment: dict[str, str], log: ProcessLog, workers: Sequence[WorkerProcess]
    ):
        super().__init__(log, job.host, {"--openai-port": job.openai_port}, job.start_seconds)
        self._job, self._workers, self.url = job, workers, f"{job.openai_url}/live"
        self._reported: Process | None = None  # which one was told to end
        self._environment = SETTINGS | environment
        self._environment["DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS"] = str(job.drain_seconds)

    def _spawn(self) -> Process:
        words = ["--http-host", self._job.host, "--http-port", str(self._job.openai_port)]
        command = [sys.executable, "-m", "dynamo.frontend", *words]
        return Process("frontend", command, self._environment, self._log)

    def _lives(self) -> bool:
        """Return whether the frontend answers. Stop one that lists no worker: its folder was removed."""
        end = time.monotonic() + LOST_SECONDS
        while alive := super()._lives():
            served = any(worker.serving for worker in self._workers)
            if self.lists(self._job.model_name) or not served or self._reported is self.process:
                break
            if time.monotonic() > end and self.process:
                self._log.say(f"{self.name} has lost its workers; it ends once requests in flight have")
                self._reported = self.process
                self.process.terminate()
                break
            time.sleep(1)
        return alive

    def lists(self, model: str) -> bool:
        """Return whether it would send requests for a model to a worker."""
        try:
            return any(
                each["id"] == model for each in json.loads(got(f"{self._job.openai_url}/v1/models", 1) or "")["data"]
            )
        except (ValueError, LookupError, TypeError):  # it says something else
            return False


class WorkerProcess(Supervised):
    """A worker, which serves once a real pass was answered."""

    def __init__(self, number: int, port: int, job: ServeOptions, environment: dict[str, str], log: ProcessLog):
        """``port``: of its metrics and health."""
        self.name, self._job, self._environment = f"worker {number}", job, environment
        self._port = port
        super().__init__(log, LOOPBACK, {f"system port of worker {number}": self._port}, job.start_seconds)
        self.url = f"http://{LOOPBACK}:{self._port}/health"

    def _spawn(self) -> Process:
        job = self._job
        words = [str(job.bundle), "--name", job.model_name]
        words += ["--system-port", str(self._port), "--drain-timeout", str(job.drain_seconds)]
        command = [sys.executable, "-m", "echo_trt", "worker", *words, *job.words]
        return Process(self.name.replace(" ", "-"), command, self._environment, self._log)

    def _lives(self) -> bool:
        """Return whether a pass was answered, or the engine still iterates: a slow one is not ready, but no failure."""
        end, before = time.monotonic() + ANSWER_SECONDS, self._iterations()
        while not (responds(self.url, 2) or self._iterations() > before):
            if time.monotonic() > end:
                return False
            time.sleep(1)
        return True

    def _iterations(self) -> float:
        return iterations(got(f"http://{LOOPBACK}:{self._port}/metrics", METRICS_SECONDS) or "")


def replicas(job: ServeOptions, environment: dict[str, str], stop: threading.Event, log: ProcessLog) -> Supervisor:
    manifest = read_manifest(job.bundle)
    devices = divided(visible_devices(manifest.engine, environment), job.replicas, manifest.recipe.tensor_parallel)
    ports = free_ports(job.replicas, job.openai_port)
    workers = [
        WorkerProcess(number, port, job, environment | own, log)
        for number, (port, own) in enumerate(zip(ports, devices, strict=True), 1)
    ]
    frontend = Frontend(job, environment, log, workers)
    url = f"http://{job.shown_host}:{job.openai_port}/v1"
    text = f"serving\nOpenAI   {url}, model {job.model_name}\nworkers  {len(workers)}"
    groups: list[Sequence[Supervised]] = [[frontend], workers]
    return Supervisor(groups, stop, log, job.drain_seconds, lambda: text if frontend.lists(job.model_name) else None)


def visible_devices(engine: str, environment: Mapping[str, str]) -> list[str]:
    """List the devices that ``engine`` may use, as VISIBLE_DEVICES names them."""
    if engine_kind(engine).card is None:
        return []
    if VISIBLE_DEVICES in environment:
        return [name.strip() for name in environment[VISIBLE_DEVICES].split(",") if name.strip()]
    from echo_trt.backends.cuda.device import device_count

    return [str(device) for device in range(device_count())]


def divided(devices: Sequence[str], workers: int, each: int) -> list[dict[str, str]]:
    """Give every worker ``each`` of the devices; workers share devices where there are fewer.

    Returns what a worker has in its environment beside the rest. It is nothing where there are not enough devices for
    one worker: that worker says so by itself.
    """
    sets = len(devices) // each
    if not sets:
        return [{}] * workers
    begins = [worker % sets * each for worker in range(workers)]
    return [{VISIBLE_DEVICES: ",".join(devices[begin : begin + each])} for begin in begins]


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
