"""What Dynamo needs to run: its packages, and the settings that it reads from the environment, by default ours."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from math import ceil

from echo_trt.adapters.dynamo.discovery import BACKEND, FOLDER, folder_of
from echo_trt.errors import UserError

#: The version that this backend was tried with.
VERSION = "1.6.1"
PACKAGES = ("ai-dynamo", "ai-dynamo-runtime")
REMEDY = f"pip install 'echo-trt[dynamo]' && pip install --no-deps ai-dynamo=={VERSION}"
END_SECONDS = 15  # seconds for a worker's end after its answers; larger: a worker that hangs then is ended later
PROBE_SECONDS = 20  # seconds for the answer to a probe; larger: a worker that hangs is noticed later
BACKENDS = ("file", "etcd", "kubernetes", "mem")
#: Where processes find each other by a folder, they are on one machine: nobody else need reach them.
LOOPBACK = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")
GRACE_PERIOD = "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"
GRACE = 0.5  # seconds between the end of a worker's entry and its drain; larger: fewer requests that move at once


def check_installed() -> None:
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; install it: {REMEDY}.") from None
        if found != VERSION:
            raise UserError(f"{package} is {found}, but this backend is for {VERSION}; install that: {REMEDY}.")


def backend_of(environment: Mapping[str, str]) -> str:
    """Return by what processes find each other. Raises UserError."""
    backend = environment.get(BACKEND) or BACKENDS[0]
    if backend not in BACKENDS:
        raise UserError(f"{BACKEND} is {backend!r}; use one of {', '.join(BACKENDS)}.")
    return backend


def grace_of(environment: Mapping[str, str]) -> float:
    """Return seconds between the end of a worker's entry and its drain. Raises UserError."""
    text = environment.get(GRACE_PERIOD) or str(GRACE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 3600:
        raise UserError(f"{GRACE_PERIOD} is {text!r}; give seconds from 0 to 3600.")
    return seconds


def completed(environment: Mapping[str, str]) -> dict[str, str]:
    backend = backend_of(environment)
    defaults = {
        BACKEND: backend,
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        GRACE_PERIOD: str(GRACE),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if backend == "file":
        defaults |= dict.fromkeys(LOOPBACK, "127.0.0.1")
        defaults |= {"DYN_SELF_HOST_METADATA": "0", FOLDER: str(folder_of(environment))}
    return defaults | dict(environment)


def of_worker(environment: Mapping[str, str], slots: int, system_port: int, drain_seconds: float) -> dict[str, str]:
    """Return the environment of a worker.

    slots          requests that the worker takes; the frontend sends others elsewhere, or refuses them (HTTP 529)
    system_port    port of metrics and health; 0: the environment's, else none
    drain_seconds  seconds that requests in flight have; Dynamo would end the process after 30
    """
    defaults = {
        "DYN_ENGINE_REQUEST_LIMIT": str(slots),
        "DYN_DYNAMO_REQUEST_QUEUE_LIMIT": "1",
        "DYN_HEALTH_CHECK_ENABLED": "true",
        "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": str(PROBE_SECONDS),
        "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": str(ceil(grace_of(environment) + drain_seconds + END_SECONDS)),
    }
    port = {"DYN_SYSTEM_PORT": str(system_port)} if system_port else {}
    return defaults | completed(environment) | port
