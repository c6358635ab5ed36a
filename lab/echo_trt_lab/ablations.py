"""Policies that show what a part of the shipped ones brings.

    echo-trt bench BUNDLE --prompts FILE --policies echo,dense,fixed,goodput,goodput-head \
      --policy-file lab/echo_trt_lab/ablations.py

Two are the paper's, of ``echo``: a gate at every depth, and one threshold for all gates.
"""

from dataclasses import asdict, replace

import numpy as np

from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.policies import echo_settings, goodput_settings, policy, policy_named


class GateByGate(EchoSettings):
    """Settings by which a device waits at every gate, and has a graph for each level alone."""

    def _passes_gates(self, requests):
        return False


@policy("dense", "ECHO with a gate at every depth", policy_named("echo").shape)
def dense(name, settings, make_goodput):
    known, gates, depths = settings.get("calibration"), settings["gates"], range(1, settings["max_depth"] + 1)
    if known:
        gates = {gate.depth: gate.threshold for gate in known.gates}
    elif gates:  # on straight lines between the sparse ones
        sparse = sorted(gates)
        gates = dict(zip(depths, np.interp(depths, sparse, [gates[depth] for depth in sparse]).tolist(), strict=True))
    return EchoPlanner(name, GateByGate(**asdict(echo_settings("echo", settings)) | {"gates": gates}))


@policy("fixed", "ECHO with one threshold for all gates", policy_named("echo").shape)
def fixed(name, settings, make_goodput):
    known, gates = settings.get("calibration"), settings["gates"]
    threshold = known.fixed_threshold if known else gates[min(gates)] if gates else 0.0
    return EchoPlanner(name, replace(echo_settings("echo", settings), gates=dict.fromkeys(gates, threshold)))


@policy("goodput-head", "the default without prompt lookup and n-grams", policy_named("goodput").shape)
def head(name, settings, make_goodput):
    planner = make_goodput(name, goodput_settings("goodput", settings))
    planner.sources = ()
    return planner
