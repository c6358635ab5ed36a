"""What a calibration promises by load: the policies, simulated on the draft trees that it was fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echo_trt.bundle.calibration import Calibration
from echo_trt.speculation.policy_names import PLAIN
from echo_trt_lab.calibration.trees import Trees
from echo_trt_lab.simulation.command import settings_for, simulate
from echo_trt_lab.simulation.machines import THIS, machine_named
from echo_trt_lab.simulation.options import SimulateOptions
from echo_trt_lab.simulation.walk import Recording

BATCHES = (1, 2, 4, 8, 16)
POLICIES = (PLAIN, "goodput", "echo", "static")
TOKENS = 1500  # measured for a policy and load; larger: less noise, a longer calibration


def predict(trees: Trees, calibration: Calibration, costs: Path) -> list[dict[str, Any]]:
    """Return rows of ``policy``, ``batch`` and ``ratio`` to plain decoding; ``costs`` is this machine's file."""
    job = SimulateOptions(
        costs, calibration=costs, machine=THIS, costs=costs, batches=BATCHES, policies=POLICIES, tokens=TOKENS
    )
    machine, recording = machine_named(THIS, costs), Recording(trees)
    settings, rows = settings_for(job, recording, calibration, machine), []
    for batch in BATCHES:
        rates = {name: simulate(name, settings, recording, calibration, machine, batch, job).rate for name in POLICIES}
        rows += [{"policy": name, "batch": batch, "ratio": rate / rates[PLAIN]} for name, rate in rates.items()]
    return rows
