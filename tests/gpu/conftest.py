"""Tests of a card. Without one they are skipped; with ECHO_TRT_GPU=walk they run on a CPU, at tiny sizes.

``scripts/gpu_proof`` runs them and writes a report, with the figures that tests give to ``figures``: they write what
became of a test to the file ECHO_TRT_GPU_RESULTS, a line of JSON when it is found, begins and has ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gpu.engines import Card

WALK = os.environ.get("ECHO_TRT_GPU") == "walk"
RESULTS = os.environ.get("ECHO_TRT_GPU_RESULTS")
SEED = int(os.environ.get("ECHO_TRT_GPU_SEED", "0"))


@pytest.fixture(scope="session")
def card() -> Card:
    import torch
    from gpu.engines import Card

    if torch.cuda.is_available() and not WALK:
        return Card(torch.device("cuda"))
    if not WALK:
        pytest.skip("PyTorch sees no CUDA device")
    from super_tree_attention.triton_attention import super_tree_attention_triton

    return Card(torch.device("cpu"), super_tree_attention_triton)


@pytest.fixture
def seed(card) -> int:
    """Seed PyTorch on all devices. Returns the run's seed, which the report names."""
    import torch

    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def figures(request) -> Callable[..., None]:
    """Put figures into the report, by name; what a test had put before it was killed is there, too."""
    known = request.node.user_properties

    def put(**named: Any) -> None:
        known.extend(named.items())
        _note(test=request.node.nodeid, verdict="running", figures=dict(known))

    return put


def _note(**facts: Any) -> None:
    if RESULTS:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(facts, default=float) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note all tests before any option deselects some: what never begins is in the report, too."""
    for item in items:
        _note(test=item.nodeid, verdict="not run")


def pytest_runtest_logstart(nodeid: str) -> None:
    _note(test=nodeid, verdict="running")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        # A skip's text is a tuple of file, line and reason.
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        reported = {"test": report.nodeid, "verdict": report.outcome, "seconds": round(report.duration, 2)}
        _note(**reported, reason=reason.removeprefix("Skipped: "), figures=dict(report.user_properties))
