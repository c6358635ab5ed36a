"""What the prefix cache spares a conversation: prompt tokens computed and time to first token, turn by turn.

    python scripts/benchmarks/prefix_turns.py BUNDLE --conversations mt_bench.jsonl

Each line of the file holds ``turns``, what a user says one after the other. Every conversation is held twice, one
request at a time: with the cache, and with a cache that is emptied before each turn; who begins changes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request

Figures = tuple[int, int, float]  # prompt tokens, those that were computed, seconds to the first token


def main(
    bundle: Path,
    conversations: Annotated[Path, Parameter(help="JSONL file with turns")],
    limit: Annotated[int, Parameter(help="conversations, spread over the file")] = 16,
    max_tokens: Annotated[int, Parameter(help="of an answer")] = 128,
) -> None:
    """One table: one row per turn."""
    rows = [json.loads(line)["turns"] for line in conversations.read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(len(rows) // limit, 1)][:limit]
    llm = LLM(bundle, batch=1, prefix_cache=True)
    llm.generate([llm.chat_ids("hello")], SamplingParams(max_tokens=8))  # the first calls are slow
    taken: dict[bool, list[list[Figures]]] = {True: [], False: []}
    for number, turns in enumerate(rows):
        for cached in (True, False) if number % 2 else (False, True):
            llm.loop.batch.forget_cached()
            taken[cached].append(hold(llm, turns, cached, max_tokens))
    table = Table("turn", "prompt", "computed", "without", "first token, ms", "without")
    for turn in range(min(map(len, rows))):
        mine, plain = ([figures[turn] for figures in taken[cached]] for cached in (True, False))
        tokens = (mean(f[0] for f in mine), mean(f[1] for f in mine), mean(f[1] for f in plain))
        seconds = (median(f[2] for f in mine), median(f[2] for f in plain))
        table.add_row(str(turn + 1), *(f"{n:.1f}" for n in tokens), *(f"{1000 * s:.1f}" for s in seconds))
    Console().print(f"{len(rows)} conversations: mean tokens of a turn, median times")
    Console().print(table)


def hold(llm: LLM, turns: Sequence[str], cached: bool, max_tokens: int) -> list[Figures]:
    """One conversation; figures of each turn."""
    messages, figures = [], []
    for output in turns:
        if not cached:
            llm.loop.batch.forget_cached()
        messages.append({"role": "user", "content": output})
        prompt = llm.chat_ids(messages)
        computed = llm.counters.prompt_tokens
        request = Request(0, np.asarray(prompt), SamplingParams(max_tokens))
        llm.loop.scheduler.add(request)
        begin = time.perf_counter()
        while not llm.loop.step():
            pass
        seconds = time.perf_counter() - begin
        while llm.loop.scheduler.busy:
            llm.loop.step()
        figures.append((len(prompt), llm.counters.prompt_tokens - computed, seconds))
        messages.append({"role": "assistant", "content": llm.tokenizer.decode(request.generated, True)})
    return figures


if __name__ == "__main__":
    run_alone(main)
