"""Bundles for servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import LIMITS, recipe_of

from echo_trt.compile.build import build


@pytest.fixture(scope="session")
def roomy_bundle(networks, tmp_path_factory) -> Path:
    """The pair close, with room for answers that take a while."""
    folder = tmp_path_factory.mktemp("roomy") / "close"
    build(recipe_of("close", networks, limits={**LIMITS, "batch": 4, "context": 480}), networks, folder)
    return folder


@pytest.fixture(scope="session")
def divided_bundle(networks, tmp_path_factory) -> Path:
    """The pair close, its target in two processes."""
    folder = tmp_path_factory.mktemp("served-divided") / "close"
    limits = {**LIMITS, "batch": 4, "context": 480}
    build(recipe_of("close", networks, engine="torch", tensor_parallel=2, limits=limits), networks, folder)
    return folder
