"""The fuzz of the loop and the service, for a few seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "proofs" / "fuzz.py"


@pytest.mark.slow
def test_random_requests_in_a_crowd_are_answered_as_by_plain_decoding(networks):
    """The first 11 seeds have rounds of both kinds."""
    command = [sys.executable, SCRIPT, "--seed", "1", "--minutes", "0.2", "--pairs", "close,lookup"]
    command += ["--networks", networks]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sum(json.loads(run.stdout.partition(": ")[2]).values()) > 0
