"""``simulate --targets``: who keeps latency targets, by policy and load, where requests come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from echo_trt.cli.outputs import json_bytes, output_file
from echo_trt.speculation.pacer import Latency
from echo_trt.speculation.planner import Planner
from echo_trt_lab.options import latency_of
from echo_trt_lab.simulation import arrivals
from echo_trt_lab.simulation.arrivals import BATCH, INTERACTIVE, STEADY, Arrival, Bursts
from echo_trt_lab.simulation.machines import Machine
from echo_trt_lab.simulation.options import SimulateOptions
from echo_trt_lab.simulation.replay import Replay
from echo_trt_lab.simulation.traffic import Traffic
from echo_trt_lab.simulation.walk import Recording
from echo_trt_lab.tables import print_table

SHARE = 0.25  # of requests that are interactive
SATURATED = 10.0  # seconds of a run with as many requests as can run, which tells the capacity; more if few end
BACKLOG = 50  # requests per slot of that run; larger: short answers do not end it earlier, and it begins later
DRAIN = 1.0  # times the seconds of arrivals for which the last answers are waited for
#: A row's name -> its policy, and whether it has targets.
ROWS = {
    "goodput": ("goodput", False),
    "goodput with targets": ("goodput", True),
    "static": ("static", False),
    "autoregressive": ("autoregressive", False),
}
COLUMNS = {
    "load": "load",
    "policy": "policy",
    "attained": "targets kept",
    "first_kept": "first token",
    "pace_kept": "per token",
    "interactive_ms": "ms per token p50 / p90",
    "batch_ms": "batch's",
    "first_ms": "first token ms p90",
    "batch_first_ms": "batch's",
    "longest_wait_ms": "longest wait ms",
    "tokens_per_s": "tokens/s",
}


def run_loads(
    job: SimulateOptions,
    make: Callable[[str, Traffic], Planner],
    recording: Recording,
    machine: Machine,
    result: dict[str, Any],
    out: Console,
) -> dict[str, Any]:
    """Simulate all rows at all loads; ``make`` returns the planner of a policy's name and a traffic."""
    latency = Latency.of(latency_of(job.targets))

    def serve(name: str, coming: Sequence[Arrival], seconds: float, targeted: bool) -> Traffic:
        classes = {INTERACTIVE: latency} if targeted else {}
        traffic = Traffic(recording, job.slots, coming, classes)
        traffic.serve(Replay(traffic, machine, make(name, traffic)), seconds)
        return traffic

    drawn = arrivals.drawn(1000.0, 1000.0, SHARE, seed=1)[: BACKLOG * job.slots]
    backlog = [Arrival(0.0, each.prompt, each.kind) for each in drawn]
    seconds = SATURATED
    while len((full := serve("goodput", backlog, seconds, False)).done) < job.slots:
        seconds *= 2
    capacity = len(full.done) / full.now
    result["capacity"] = {"requests_per_s": round(capacity, 2), "tokens_per_s": round(full.tokens / full.now, 1)}
    with output_file("--json", job.json_file, (job.recording, job.calibration)) as write_json:
        for load in job.loads:
            coming = coming_at(job, load * capacity)
            for row, (name, targeted) in ROWS.items():
                traffic = serve(name, coming, (1 + DRAIN) * job.seconds, targeted)
                result["results"].append({"load": load, "policy": row, **figures(traffic, latency, job.seconds)})
        print_table(out, table(result, job))
        write_json(json_bytes(result))
    return result


def coming_at(job: SimulateOptions, rate: float) -> list[Arrival]:
    """Return the arrivals of ``rate`` requests per second; a trace's times are stretched to it. Raises UserError."""
    if job.arrivals in ("poisson", "bursts"):
        bursts = Bursts(job.seconds / 2, job.seconds / 8) if job.arrivals == "bursts" else STEADY
        return arrivals.drawn(rate, job.seconds, SHARE, bursts)
    trace = arrivals.read(Path(job.arrivals))
    stretch = len(trace) / max(trace[-1].time - trace[0].time, 1e-9) / rate
    return [Arrival((each.time - trace[0].time) * stretch, each.prompt, each.kind) for each in trace]


def figures(traffic: Traffic, latency: Latency, seconds: float) -> dict[str, Any]:
    """Return a row; who has no answer yet when the run ends has missed its targets."""
    classes = {kind: [o for o in traffic.done if o.arrival.kind == kind] for kind in (INTERACTIVE, BATCH)}
    ours, theirs = classes[INTERACTIVE], classes[BATCH]
    requested = max(len(ours) + traffic.unanswered(INTERACTIVE), 1)
    return {
        "attained": sum(o.kept(latency) for o in ours) / requested,
        "first_kept": sum(latency.kept(o.ttft, 0.0) for o in ours) / requested,
        "pace_kept": sum(latency.kept(0.0, o.tpot) for o in ours) / requested,
        "interactive_ms": _ms([o.tpot for o in ours], 50, 90),
        "batch_ms": _ms([o.tpot for o in theirs], 50, 90),
        "first_ms": _ms([o.ttft for o in ours], 90),
        "batch_first_ms": _ms([o.ttft for o in theirs], 90),
        "longest_wait_ms": round(1e3 * max((o.wait for o in traffic.done), default=0.0), 1),
        "tokens_per_s": round(traffic.tokens / traffic.now, 1),
    }


def table(result: dict[str, Any], job: SimulateOptions) -> Table:
    wanted = f"{job.targets[0]:g} ms to the first token and {job.targets[1]:g} ms per token"
    title = f"{result['machine']}, {job.slots} slots, {job.arrivals}; a quarter of the requests wants {wanted}"
    shown = Table(title=title, title_justify="left")
    for name, head in COLUMNS.items():
        shown.add_column(head, justify="left" if name == "policy" else "right")
    for row in result["results"]:
        shown.add_row(*(_cell(row[name], name) for name in COLUMNS), end_section=row["policy"] == [*ROWS][-1])
    return shown


def _ms(seconds: list[float], *percents: int) -> list[float]:
    return [round(1e3 * float(np.percentile(seconds, percent)), 2) for percent in percents] if seconds else []


def _cell(value: Any, name: str) -> str:
    if isinstance(value, list):
        return " / ".join(f"{each:.1f}" for each in value)
    if name in ("attained", "first_kept", "pace_kept"):
        return f"{value:.1%}"
    return f"{value:g}" if isinstance(value, float) else str(value)
