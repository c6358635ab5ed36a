"""Count what an iteration asks of a device under each policy, and time the host's part around a free device.

python scripts/benchmarks/device_iteration.py --batch 1,64,256 [--json FILE]

The load is mixed, and gates, depth and beams are Qwen3-8B's (``echo_trt_lab.device_counts``). "clients" is the time of
telling clients what an iteration wrote, which a server does while the next pass runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from echo_trt.engine.core import Emitted, EngineCore
from echo_trt.engine.options import bounds, run_alone
from echo_trt.engine.text.stream import AnswerText
from echo_trt_lab.device_counts import POLICIES, Run

COUNTED = 8  # iterations whose counts are reported, as of tests/lab/device_counts.json
TOKENIZER = Path("bundles/smollm2-135m/tokenizer.json")
COLUMNS = {
    "draft_tokens": "drafted", "catch_up": "catch-up", "considered": "considered", "verified": "verified",
    "passes": "passes", "waits": "waits", "launches": "launches", "host_ms": "host, ms", "clients_ms": "clients, ms",
}  # fmt: skip


def telling(emissions: Sequence[Emitted], loop: EngineCore, tokenizer: Tokenizer) -> float:
    """Return the seconds in which the tokens of ``emissions`` become events of a server."""
    texts = {request: AnswerText(tokenizer, request.params) for request, _ in emissions[0]}
    start = time.perf_counter()
    for step_output in emissions:
        for request, tokens in step_output:
            texts[request].follow(request, tokens, loop.scheduler.cancel)
    return time.perf_counter() - start


def row_of(policy: str, batch: int, iterations: int, tokenizer: Tokenizer | None) -> dict[str, float | str]:
    run = Run(policy, batch, COUNTED + iterations)
    counts = run.counted(COUNTED)
    host_ms, emissions = run.timed(iterations)
    clients_ms = 1e3 * telling(emissions, run.loop, tokenizer) / iterations if tokenizer else 0.0
    timed = {"host_ms": round(host_ms, 3), "clients_ms": round(clients_ms, 3)}
    return {"policy": policy, "batch": batch, **counts, **timed}


def main(
    batch: Annotated[str, Parameter(help="Requests, several by comma.")] = "1,64,256",
    iterations: Annotated[int, Parameter(validator=bounds(1), help="Timed iterations.")] = 60,
    tokenizer: Annotated[Path, Parameter(help="The clients' tokenizer; where it is missing clients take 0.")] = (
        TOKENIZER
    ),
    json_file: Annotated[Path | None, Parameter(name="--json", help="Write the rows to this file.")] = None,
) -> None:
    torch.set_num_threads(1)
    words = Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None
    table, rows = Table("B", "policy", *COLUMNS.values(), title="per iteration"), []
    for count in (int(part) for part in batch.split(",")):
        for policy in POLICIES:
            row = row_of(policy, count, iterations, words)
            rows.append(row)
            table.add_row(str(count), policy, *(f"{row[name]:,.1f}" for name in COLUMNS))
    Console(width=130).print(table)
    if json_file:
        json_file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_alone(main)
