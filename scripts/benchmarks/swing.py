"""A load that swings: what each policy makes of every level, and how long it takes to adapt.

    python scripts/benchmarks/swing.py BUNDLE --prompts FILE --levels 1,48,1

Requests are kept coming so that ``levels`` of them run at once, one level after the other; going down, no new ones come
until so few are left. Counted are iterations at full level without prompt tokens. Policies run side by side, in turns
of a second.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from echo_trt.engine.core import EngineCore
from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.files.prompts import read_prompts
from echo_trt_lab.benchmark.closed_loop import run_side_by_side
from echo_trt_lab.side_by_side import side_by_side

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


class Swing:
    """One policy's run through the levels, ``each`` counted tokens per request of one."""

    def __init__(self, loop: EngineCore, prompts: list[list[int]], sizes: list[int], each: int, max_tokens: int):
        self.loop, self.emitted = loop, 0
        self.levels = [Level(size) for size in sizes]
        self._prompts, self._each, self._params = prompts, each, SamplingParams(max_tokens)
        self._number, self._at = 0, 0
        self._running: deque[Request] = deque()

    @property
    def busy(self) -> bool:
        return self._at < len(self.levels)

    def run(self, seconds: float) -> None:
        """For so long, or to the end; what still runs then is forgotten."""
        end = time.perf_counter() + seconds
        while self.busy and time.perf_counter() < end:
            self._step(self.levels[self._at])
        if not self.busy:
            for request in self._running:
                self.loop.scheduler.cancel(request)

    def _step(self, level: Level) -> None:
        running, counters = self._running, self.loop.counters
        while len(running) < level.size:
            ids = np.asarray(self._prompts[self._number % len(self._prompts)])
            running.append(Request(self._number, ids, self._params))
            self.loop.scheduler.add(running[-1])
            self._number += 1
        prompt_tokens, emitted = counters.prompt_tokens, counters.emitted_tokens
        begin = time.perf_counter()
        self.loop.step()
        seconds, tokens = time.perf_counter() - begin, counters.emitted_tokens - emitted
        self.emitted += tokens
        if len(running) == level.size and counters.prompt_tokens == prompt_tokens:
            level.tokens.append(tokens)
            level.seconds.append(seconds)
        self._running = deque(request for request in running if not request.finish_reason)
        self._at += sum(level.tokens) >= self._each * level.size


def main(
    bundle: Path,
    prompts: Annotated[list[Path], Parameter(help="JSONL files")],
    levels: Annotated[str, Parameter(help="requests at once, one after the other")] = "1,48,1",
    policies: Annotated[str, Parameter(help="compared with plain decoding")] = "static,echo,goodput",
    each: Annotated[int, Parameter(help="counted tokens of a level, a request of it")] = 256,
    max_tokens: int = 128,
) -> None:
    """One table: one row per policy, its tokens/s and ratio at each level, and how fast it adapted."""
    sizes, names = [int(size) for size in levels.split(",")], [PLAIN, *policies.split(",")]
    llm = LLM(bundle, batch=max(sizes) * len(names), prefix_cache=False)  # prompts repeat; a part of the pool each
    ids = [llm.chat_ids(p.text) for file in prompts for p in read_prompts(file)]
    runs = {}
    for policy, loop in zip(names, side_by_side(llm, names), strict=True):
        runs[policy] = Swing(loop, ids, sizes, each, max_tokens)
    run_side_by_side(list(runs.values()))
    table = Table(
        "policy", *(f"level {size}" for size in sizes), "adapted after, s", title="tokens/s and ratio to plain"
    )
    plain = runs[PLAIN].levels
    for policy, done in runs.items():
        cells = [f"{mine.rate:.1f}  {mine.rate / its.rate:.2f}" for mine, its in zip(done.levels, plain, strict=True)]
        table.add_row(policy, *cells, "  ".join(f"{level.adapted_after:.2f}" for level in done.levels))
    Console().print(table)


if __name__ == "__main__":
    run_alone(main)
