"""Bundles for servers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pairs import LIMITS, recipe_of

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
