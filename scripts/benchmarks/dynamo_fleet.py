"""A simulated fleet under a bursty trace: KV router against round robin, with speculation and without.

    python scripts/benchmarks/dynamo_fleet.py bundles/smollm2-135m/costs.json

Speeds are measured ones: docs/benchmarks.json's tokens per second by concurrent requests, and what a pass over a prompt
chunk costs by the bundle's costs.json. The trace is drawn from a seed: conversations of four turns in 16 families that
begin with the same 384 tokens, and bursts of three times the usual rate. One table is for 2 to 64 replicas at a load
per replica that stays the same; another tells how many replicas a load needs. A minute on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from echo_trt_lab.simulation.fleet import (
    KvRouter,
    RoundRobin,
    Router,
    Speed,
    Summary,
    TraceSettings,
    make_trace,
    simulate_fleet,
)
from echo_trt_lab.simulation.machines import from_costs_file

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 64  # tokens of a pass over prompts
CACHED = 24_000  # tokens that a replica's prefix cache holds: some 30 conversations, a fraction of those that are open
ROUTERS: dict[str, type[Router]] = {"round robin": RoundRobin, "KV router": KvRouter}
POLICIES = {"plain": "autoregressive", "speculation": "goodput"}
REPLICAS = (2, 4, 8, 16, 32, 64)
WAIT = 2.0  # seconds to the first token that 99 of 100 requests may take
LOADS = (0.2, 0.4, 0.8, 1.6, 3.2)  # conversations per second
MOST = 128  # replicas
SCALES, SCALED = (1, 2, 4, 8, 16), 16  # of the router's prefill load, at so many replicas


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("costs", type=Path)
    options.add_argument("--rates", type=Path, default=ROOT / "docs" / "benchmarks.json")
    options.add_argument("--load", type=float, default=0.2, help="conversations per second, a replica")
    options.add_argument("--seconds", type=float, default=300)
    requested = options.parse_args()
    speeds = {name: speed(requested.rates, policy, requested.costs) for name, policy in POLICIES.items()}
    print(f"{requested.load} conversations per second and replica, on average\n")
    columns = "replicas", "router", "decoding", "tokens/s", "busy", "prompt cached", "turns home"
    print(f"| {' | '.join(columns)} | first token p50, p99 | p99 a token |\n|{'---|' * (len(columns) + 2)}")
    for count in REPLICAS:
        trace = make_trace(TraceSettings(requested.load * count, requested.seconds))
        for router in ROUTERS:
            for policy in POLICIES:
                run = simulate_fleet(trace, count, speeds[policy], ROUTERS[router]())
                print(f"| {count} | {router} | {policy} | {figures(run)} |", flush=True)
    print(f"\nReplicas that keep 99 of 100 first tokens within {WAIT:g} s\n")
    print("| conversations per second | " + " | ".join(f"{r}, {p}" for r in ROUTERS for p in POLICIES) + " |")
    print("|---|" + "---|" * (len(ROUTERS) * len(POLICIES)))
    for load in LOADS:
        trace = make_trace(TraceSettings(load, requested.seconds))
        needed = [enough(trace, speeds[policy], ROUTERS[router]) for router in ROUTERS for policy in POLICIES]
        print(f"| {load} | " + " | ".join(needed) + " |", flush=True)
    print(f"\nThe KV router's prefill load scale, for {SCALED} replicas with speculation\n")
    print(f"| scale | {' | '.join(columns[3:])} | first token p50, p99 | p99 a token |\n|{'---|' * 7}")
    trace = make_trace(TraceSettings(requested.load * SCALED, requested.seconds))
    for scale in SCALES:
        run = simulate_fleet(trace, SCALED, speeds["speculation"], KvRouter(scale))
        print(f"| {scale} | {figures(run)} |", flush=True)


def speed(rates: Path, policy: str, costs: Path) -> Speed:
    """Return the measured speed of a replica."""
    rows = [row for row in json.loads(rates.read_text())["results"] if row["policy"] == policy and row["set"] == "all"]
    rows.sort(key=lambda row: row["batch"])
    prompt = from_costs_file(costs).costs().target(CHUNK, 0) / CHUNK
    batches, tokens = [row["batch"] for row in rows], [row["decode_tokens_per_s"] for row in rows]
    return Speed(batches, tokens, prompt, CACHED)


def figures(run: Summary) -> str:
    p99 = run.token[int(0.99 * (len(run.token) - 1))]
    first = f"{run.first_percentile(50):.2f} s, {run.first_percentile(99):.2f} s"
    shares = f"{run.busy:.0%} | {run.cached:.0%} | {run.home:.0%}"
    return f"{run.tokens_per_second:.0f} | {shares} | {first} | {1e3 * p99:.0f} ms"


def enough(trace: list, speed: Speed, router: type[Router]) -> str:
    """Return the fewest replicas that answer in time, and how busy they are; by halving, as if more never hurt."""

    def in_time(count: int) -> Summary | None:
        run = simulate_fleet(trace, count, speed, router())
        return run if run.first_percentile(99) <= WAIT else None

    few, many = 0, 1
    while not (best := in_time(many)):
        if many >= MOST:
            return f"more than {MOST}"
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        if run := in_time(middle):
            many, best = middle, run
        else:
            few = middle
    return f"{many} ({best.busy:.0%} busy)"


if __name__ == "__main__":
    main()
