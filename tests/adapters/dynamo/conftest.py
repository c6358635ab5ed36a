"""A bundle for workers, and a frontend with two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from cluster import Cluster
from pairs import LIMITS, recipe_of

from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM

ROOMY = {**LIMITS, "batch": 4, "context": 1600}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what asks for the real Dynamo where it is not."""
    if find_spec("dynamo.common") is None:
        reason = "ai-dynamo is not installed: pip install -e '.[dynamo]' && pip install --no-deps ai-dynamo==1.6.1"
        for item in items:
            if "needs_dynamo" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def worker_bundle(made_once, networks) -> Path:
    """Return the pair close, with room for answers that take a while (tests/server has the same one), at one path."""
    recipe = recipe_of("close", networks, limits=ROOMY)
    return made_once("long", lambda out: build(recipe, networks, out))


@pytest.fixture(scope="module")
def cluster(worker_bundle, tmp_path_factory) -> Iterator[Cluster]:
    """Whole again after each test."""
    options = "--queue", 4, "--drain-timeout", 60
    with Cluster(worker_bundle, tmp_path_factory.mktemp("dynamo"), *options) as running:
        running.wait_for_workers(2)
        yield running


@pytest.fixture(scope="session")
def offline(worker_bundle) -> Callable[..., LLM]:
    """Plain decoding, one request at a time."""
    return LLM(worker_bundle, "autoregressive", 1)
