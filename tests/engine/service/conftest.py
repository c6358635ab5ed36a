"""Bundles for servers, a server for a file, and services in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driving import assert_all_free
from pairs import LIMITS, recipe_of
from served import Served
from steered import Steered

from echo_trt.cli.build import build
from echo_trt.engine.service import service as service_module
from echo_trt.engine.service.service import Service

ROOMY = {**LIMITS, "batch": 4, "context": 480}


@pytest.fixture(scope="session")
def roomy_bundle(made_once, networks, tmp_path_factory) -> Path:
    """Return the pair close, with room for answers that take a while."""
    recipe = recipe_of("close", networks, limits=ROOMY)
    bundle = made_once("roomy", lambda out: build(recipe, networks, out))
    return shutil.copytree(bundle, tmp_path_factory.mktemp("roomy") / "close")


@pytest.fixture(scope="session")
def divided_bundle(networks, tmp_path_factory) -> Path:
    """Return the pair close, its target in two processes."""
    folder = tmp_path_factory.mktemp("served-divided") / "close"
    build(recipe_of("close", networks, engine="torch", tensor_parallel=2, limits=ROOMY), networks, folder)
    return folder


@pytest.fixture(scope="module")
def server(roomy_bundle, tmp_path_factory, request) -> Iterator[Served]:
    """Return the server of a file, with the options that the file's SERVE holds, and Triton where its TRITON is
    true.
    """
    options, triton = getattr(request.module, "SERVE", ()), getattr(request.module, "TRITON", False)
    log = tmp_path_factory.mktemp("served") / "log"
    with Served(roomy_bundle, log, *options, triton=triton).wait_for("serving") as served:
        yield served


@pytest.fixture
def start(open_llm, monkeypatch) -> Iterator[Callable[..., tuple[Service, Steered]]]:
    """(batch, policy, queue) -> a service of the pair close, and its target."""
    monkeypatch.setattr(service_module, "MANY", 1)  # tokens of a few requests wait for the next pass, too
    services = []

    def make(batch: int = 3, policy: str = "echo", queue: int = 256) -> tuple[Service, Steered]:
        llm = open_llm("close", policy, batch)
        llm.loop.target = steered = Steered(llm.loop.target)
        services.append(Service(llm, queue))
        return services[-1], steered

    yield make
    for service in services:
        service.loop.target.open.set()
        service.close(0)
        assert_all_free(service.loop)
