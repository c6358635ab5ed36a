"""A load that swings within one run: what each policy makes of every level, and how long it takes to adapt.

    python scripts/swing.py BUNDLE --prompts FILE --levels 1,48,1

Requests are kept coming so that ``levels`` of them run at once, one level after the other; going down, no new ones come
until so few are left. Counted are iterations at full level without prompt tokens.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from echo_trt.prompts import read_prompts
from echo_trt.runtime.llm import LLM
from echo_trt.runtime.loop import Request
from echo_trt.runtime.params import SamplingParams

PLAIN = "autoregressive"
WINDOW = 12  # iterations of the moving rate that says when a policy has adapted
NEAR = 0.9  # of the level's final rate


@dataclass
class Level:
    """Iterations at one level: tokens and seconds of each."""

    size: int
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return sum(self.tokens) / sum(self.seconds)

    @property
    def adapted_after(self) -> float:
        """Seconds until the moving rate first comes near that of the level's second half."""
        half = len(self.tokens) // 2
        goal = NEAR * sum(self.tokens[half:]) / sum(self.seconds[half:])
        tokens, seconds = np.cumsum([0, *self.tokens]), np.cumsum([0.0, *self.seconds])
        for begin in range(len(self.tokens) - WINDOW):
            if tokens[begin + WINDOW] - tokens[begin] >= goal * (seconds[begin + WINDOW] - seconds[begin]):
                return float(seconds[begin])
        return float(seconds[-1])


def swing(llm: LLM, prompts: list[list[int]], sizes: list[int], iterations: int, max_tokens: int) -> list[Level]:
    """Run through the levels, ``iterations`` counted ones of each."""
    loop, number = llm.loop, 0
    running: deque[Request] = deque()
    levels = [Level(size) for size in sizes]
    for level in levels:
        while len(level.tokens) < iterations:
            while len(running) < level.size:
                ids = np.asarray(prompts[number % len(prompts)])
                request = Request(number, ids, SamplingParams(max_tokens))
                loop.add(request)
                running.append(request)
                number += 1
            counters = loop.counters
            prompt_tokens, emitted = counters.prompt_tokens, counters.emitted_tokens
            begin = time.perf_counter()
            loop.step()
            seconds = time.perf_counter() - begin
            if len(running) == level.size and counters.prompt_tokens == prompt_tokens:
                level.tokens.append(counters.emitted_tokens - emitted)
                level.seconds.append(seconds)
            running = deque(request for request in running if not request.finish_reason)
    for request in running:
        loop.cancel(request)
    return levels


def main(
    bundle: Path,
    prompts: Annotated[list[Path], typer.Option(help="JSONL files")],
    levels: Annotated[str, typer.Option(help="requests at once, one after the other")] = "1,48,1",
    policies: Annotated[str, typer.Option(help="compared with plain decoding")] = "static,echo,goodput",
    iterations: Annotated[int, typer.Option(help="counted iterations of a level")] = 150,
    max_tokens: int = 128,
) -> None:
    """One table: a row a policy, its tokens/s and ratio at each level, and how fast it adapted."""
    sizes = [int(size) for size in levels.split(",")]
    llm = LLM(bundle, batch=max(sizes), prefix_cache=False)  # prompts repeat
    ids = [llm.chat_ids(p.text) for file in prompts for p in read_prompts(file)]
    runs = {}
    for policy in (PLAIN, *policies.split(",")):
        llm.set_policy(policy)
        runs[policy] = swing(llm, ids, sizes, iterations, max_tokens)
    table = Table(
        "policy", *(f"level {size}" for size in sizes), "adapted after, s", title="tokens/s and ratio to plain"
    )
    for policy, done in runs.items():
        cells = [f"{mine.rate:.1f}  {mine.rate / its.rate:.2f}" for mine, its in zip(done, runs[PLAIN], strict=True)]
        table.add_row(policy, *cells, "  ".join(f"{level.adapted_after:.2f}" for level in done))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
