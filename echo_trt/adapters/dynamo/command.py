"""``echo-trt worker``: one engine behind Dynamo's frontend, until SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import replace
from typing import Any

from echo_trt.adapters.dynamo.discovery import BACKEND, Lease, check_folder, check_name, folder_of
from echo_trt.adapters.dynamo.environment import backend_of, check_installed, grace_of, of_worker
from echo_trt.adapters.dynamo.options import WorkerOptions
from echo_trt.bundle.card import check_card, has_template
from echo_trt.bundle.manifest import read_manifest
from echo_trt.errors import UserError, described
from echo_trt.speculation.policies import policy_named
from echo_trt.supervision.supervised import port_trouble

log = logging.getLogger(__name__)

COMPONENT = "echo"
#: Ports that a user may fix -> where they are bound. Event sockets get theirs from the system, always.
PORTS = {
    "DYN_SYSTEM_PORT": "DYN_SYSTEM_HOST",
    "DYN_TCP_RPC_PORT": "DYN_TCP_RPC_HOST",
    "DYN_TCP_RESPONSE_STREAM_PORT": "DYN_TCP_RESPONSE_STREAM_HOST",
}
CLEANUP = 1.0  # seconds until the engine hears that it must stop, besides; larger: a lost entry is missing longer


def run(job: WorkerOptions) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 1 where the engine died.

    Raises UserError for wrong options, bundles and environments, and for an engine that cannot start.
    """
    job = _check(job)
    batch = job.batch or read_manifest(job.bundle).recipe.limits.batch
    os.environ.update(of_worker(os.environ, batch + job.queue, job.system_port, job.drain_seconds))
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    lease = Lease(
        folder_of(os.environ),
        grace_of(os.environ) + CLEANUP,
        lambda number: log.warning("%d lost entries were written anew", number),
    )
    from dynamo.common.backend.run import run as run_worker

    from echo_trt.adapters.dynamo.engine import EchoEngine

    engine = EchoEngine(job, lease if os.environ[BACKEND] == "file" else None)

    async def make(argv: list[str] | None) -> tuple[EchoEngine, Any]:
        return engine, _worker_config(job)

    for number in (signal.SIGINT, signal.SIGTERM):  # Dynamo's own from now on
        signal.signal(number, signal.SIG_DFL)
    try:
        run_worker(EchoEngine, engine_factory=make)
    except Exception as error:
        if engine.failure:
            raise engine.failure from None
        log.exception("Dynamo's worker ended")
        raise UserError(f"Dynamo's worker could not serve ({described(error)}); see its lines above.") from error
    return 1 if engine.died else 0


def _check(job: WorkerOptions) -> WorkerOptions:
    """Return the job with the bundle's whole path, by which all workers must name it."""
    manifest = read_manifest(job.bundle)
    check_card(job.bundle)
    if job.policy:
        policy_named(job.policy, "--policy")
    _check_ports(job)
    job = replace(job, bundle=job.bundle.resolve(), name=job.name or manifest.name)
    if backend_of(os.environ) == "file":
        folder = folder_of(os.environ)
        check_folder(folder)
        check_name(folder, job.name, job.bundle)
    check_installed()
    _check_parsers(job)
    return job


def _check_ports(job: WorkerOptions) -> None:
    requested = [("--system-port", "127.0.0.1", job.system_port)] if job.system_port else []
    for name, host in PORTS.items():
        text = os.environ.get(name, "0")
        if not (text.isascii() and text.isdigit() and int(text) < 2**16):
            raise UserError(f"{name} is {text!r}; give a port from 0 to 65535.")
        if not (job.system_port and name == "DYN_SYSTEM_PORT"):
            requested.append((name, os.environ.get(host, "127.0.0.1"), int(text)))
    for name, host, port in requested:
        if port and (trouble := port_trouble(name, host, port)):
            raise UserError(f"{trouble}.")


def _check_parsers(job: WorkerOptions) -> None:
    from dynamo._core import get_reasoning_parser_names, get_tool_parser_names

    for option, name, known in (
        ("--tool-call-parser", job.tool_call_parser, get_tool_parser_names()),
        ("--reasoning-parser", job.reasoning_parser, get_reasoning_parser_names()),
    ):
        if name and name not in known:
            raise UserError(f"{option} is {name!r}; Dynamo has {', '.join(sorted(known))}.")


def _worker_config(job: WorkerOptions) -> Any:
    """Return what Dynamo's own variables say, and the model."""
    import argparse

    from dynamo.common.backend import WorkerConfig
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig

    parser = argparse.ArgumentParser()
    DynamoRuntimeArgGroup().add_arguments(parser)
    settings = DynamoRuntimeConfig.from_cli_args(parser.parse_args([]))
    settings.validate()
    return WorkerConfig.from_runtime_config(
        settings,
        str(job.bundle),
        job.name,
        component=COMPONENT,
        endpoint="generate",
        endpoint_types="chat,completions" if has_template(job.bundle) else "completions",
        tool_call_parser=job.tool_call_parser or settings.dyn_tool_call_parser,
        reasoning_parser=job.reasoning_parser or settings.dyn_reasoning_parser,
    )
