"""``echo-trt serve``: an engine, by itself or in Triton, and the API server, supervised and drained as one service."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

from echo_trt.adapters.triton.host import Triton
from echo_trt.adapters.triton.server import TritonServer, find_server, own_prefix, remove_folders, remove_regions
from echo_trt.engine.latency import LatencyClasses
from echo_trt.engine.service import MODEL
from echo_trt.errors import UserError
from echo_trt.server.keys import read as read_keys
from echo_trt.server.options import ANY, checked_hosts, checked_names, checked_origins
from echo_trt.supervision.engine import EngineProcess
from echo_trt.supervision.options import ServeOptions
from echo_trt.supervision.probe import tells
from echo_trt.supervision.process import Process, ProcessLog
from echo_trt.supervision.supervised import ANSWER_SECONDS, Supervised, Supervisor, port_trouble, supervise


def run(job: ServeOptions) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit code: 0 where all answers were finished.

    Raises UserError for wrong options, and StartFailed for a process that does not start.
    """
    job = replace(job, host=_address(job.host, socket.AF_INET if job.triton else socket.AF_UNSPEC))
    _check(job)
    named = tuple(name for name in job.served_model_names if name != ANY) or (MODEL, _name(job.bundle))
    names = named + ((ANY,) if ANY in job.served_model_names else ())
    job = replace(job, served_model_names=checked_names(names))
    server = find_server() if job.triton else None
    remove_folders(Path(tempfile.gettempdir()))
    try:
        return supervise(own_prefix(), job.log_format, lambda *given: service(job, server, *given))
    finally:
        remove_regions()


def _name(bundle: Path) -> str:
    """Return the target's name, or the bundle's. Raises UserError.

    Reads no more of the manifest, which the engine checks: importing what checks it would take half a second.
    """
    try:
        manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
        target = manifest["recipe"]["target"]
        return str((not target.get("random_weights") and target.get("hub")) or manifest["name"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        from echo_trt.bundle.manifest import read_manifest

        return read_manifest(bundle).name


def _check(job: ServeOptions) -> None:
    """Raise UserError for options that cannot be served."""
    if job.given_triton_ports and not job.triton:
        option = job.given_triton_ports[0]
        raise UserError(f"{option} is a port of Triton's, which is not started; add --triton, or leave the port out.")
    wanted = job.ports
    if not wanted:
        raise UserError("--openai-port is 0 and --triton is not given, so nothing would be served; change one of them.")
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"{', '.join(map(str, wanted.values()))} are the ports asked for; give each a port of its own.")
    for option, port in wanted.items():
        if trouble := port_trouble(option, job.host, port):
            raise UserError(f"{trouble}.")
    if job.api_keys:  # what the API server refuses, too
        read_keys(job.api_keys, list(LatencyClasses(job.latency_classes)))
    checked_origins(job.allowed_origins)
    checked_hosts(job.allowed_hosts)


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


class ApiServer(Supervised):
    """The API server's process, which serves once it works by itself, without an engine.

    It is asked on a socket of its own, which clients can neither reach nor fill.
    """

    name = "the API server"

    def __init__(self, job: ServeOptions, log: ProcessLog, engine: Path):
        """``engine``: the socket that the engine's host listens on."""
        super().__init__(log, job.host, {"--openai-port": job.openai_port}, job.start_seconds)
        self._job, self._engine, self.socket = job, engine, engine.with_name("door")

    def _spawn(self) -> Process:
        job = self._job
        words = ["--engine-socket", str(self._engine), "--bundle", str(job.bundle), "--port", str(job.openai_port)]
        words += [*job.api_words, "--drain-seconds", str(job.drain_seconds), f"--latency-classes={job.latency_classes}"]
        words += ["--liveness-socket", str(self.socket), "--log-format=json"]
        self.socket.unlink(missing_ok=True)
        return Process("server", [sys.executable, "-m", "echo_trt.server", *words], dict(os.environ), self._log)

    def _ready(self) -> bool:
        return tells(self.socket, 1)

    def _lives(self) -> bool:
        return tells(self.socket, ANSWER_SECONDS)


def service(
    job: ServeOptions, server: TritonServer | None, work: Path, stop: threading.Event, log: ProcessLog
) -> Supervisor:
    """Return an engine, in ``server`` if there is one, and the API server as one service."""
    job = job.keeping_costs(work)
    engine = Triton(job, server, work, log) if server else EngineProcess(job, work, log)
    processes = [engine, ApiServer(job, log, engine.socket)] if job.openai_port else [engine]
    return Supervisor([processes], stop, log, job.drain_seconds, lambda: _urls(job))


def _urls(job: ServeOptions) -> str:
    def line(name: str, port: int, path: str) -> str:
        return f"{name:8} http://{job.shown_host}:{port}{path}"

    lines = ["serving"]
    if job.triton:
        lines.append(line("HTTP", job.triton_ports["http"], f"/v2/models/{MODEL}/generate_stream"))
        lines.append(f"gRPC     {job.shown_host}:{job.triton_ports['grpc']}")
    lines.append(line("metrics", job.triton_ports["metrics"] if job.triton else job.openai_port, "/metrics"))
    if job.openai_port:
        lines.append(line("OpenAI", job.openai_port, "/v1"))
        lines += [line("page", job.openai_port, "/")] if job.page else []
    return "\n".join(lines)
