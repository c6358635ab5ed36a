"""Bundles for servers, and a server for a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pairs import LIMITS, recipe_of
from served import Served

from echo_trt.commands.build import build

ROOMY = {**LIMITS, "batch": 4, "context": 480}


@pytest.fixture(scope="session")
def roomy_bundle(made_once, networks, tmp_path_factory) -> Path:
    """The pair close, with room for answers that take a while."""
    recipe = recipe_of("close", networks, limits=ROOMY)
    bundle = made_once("roomy", lambda out: build(recipe, networks, out))
    return shutil.copytree(bundle, tmp_path_factory.mktemp("roomy") / "close")


@pytest.fixture(scope="session")
def divided_bundle(networks, tmp_path_factory) -> Path:
    """The pair close, its target in two processes."""
    folder = tmp_path_factory.mktemp("served-divided") / "close"
    build(recipe_of("close", networks, engine="torch", tensor_parallel=2, limits=ROOMY), networks, folder)
    return folder


@pytest.fixture(scope="module")
def server(roomy_bundle, tmp_path_factory, request) -> Iterator[Served]:
    """The server of a file, with the options that the file's SERVE holds, and a gateway where GATEWAY is true."""
    options, gateway = getattr(request.module, "SERVE", ()), getattr(request.module, "GATEWAY", False)
    served = Served(roomy_bundle, tmp_path_factory.mktemp("served") / "log", *options, gateway=gateway)
    try:
        yield served.wait_for("serving")
    finally:
        served.kill()
