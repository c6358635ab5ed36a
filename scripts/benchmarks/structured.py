"""How much faster is structured output? Plain decoding and goodput under the same grammars, in turns.

    python scripts/benchmarks/structured.py BUNDLE [--prompts FILE] [--batches 1,4,8] [--rounds 3]

A row of the file has a prompt and what its answer must fit. Besides goodput as it is, it is tried without the chains
that grammars force, and without pruning what they forbid. Prints a table in markdown: tokens per second as a ratio to
plain decoding's, pooled over rounds, with the share of tokens that came from the grammar.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

from cyclopts import Parameter

from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.sources.grammars import GrammarSource
from echo_trt.speculation.planner import Planner

PROMPTS = Path(__file__).with_name("structured_prompts.jsonl")
PRUNE = "echo_trt.engine.drafters.grammars.prune"


@dataclass
class Variant:
    """One way to decode, and what came of it."""

    name: str
    planner: Planner
    prunes: bool = True
    tokens: int = 0
    seconds: float = 0.0
    verifications: int = 0
    texts: list[list[int]] = field(default_factory=list)

    def run(self, llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> None:
        llm.loop.planner = self.planner
        before, begin = llm.counters.copy(), time.perf_counter()
        with ExitStack() as stack:
            if not self.prunes:
                stack.enter_context(patch(PRUNE, lambda states, log_q, tokens: (log_q, tokens)))
            answers = llm.generate(prompts, params)
        self.seconds += time.perf_counter() - begin
        self.tokens += sum(len(answer.token_ids) for answer in answers)
        self.verifications += llm.counters.verifications - before.verifications
        self.texts += [answer.token_ids for answer in answers]

    @property
    def from_grammar(self) -> float:
        """Accepted tokens that the grammar proposed."""
        return self.planner.totals().get("accepted", {}).get("grammar", 0.0)


def variants(llm: LLM) -> list[Variant]:
    """Fresh planners, so that none has learnt from another batch."""
    unforced = llm.tuning.planner("goodput")
    unforced.sources = [source for source in unforced.sources if not isinstance(source, GrammarSource)]
    return [
        Variant("plain decoding", llm.tuning.planner("autoregressive")),
        Variant("goodput", llm.tuning.planner("goodput")),
        Variant("without forced chains", unforced),
        Variant("without pruning", llm.tuning.planner("goodput"), prunes=False),
    ]


def main(
    bundle: Path,
    prompts: Annotated[Path, Parameter(help="JSONL: prompt and structured a line")] = PROMPTS,
    batches: str = "1,4,8",
    rounds: int = 3,
    max_tokens: int = 96,
    limit: Annotated[int, Parameter(help="prompts, spread over the file; 0 for all")] = 0,
) -> None:
    """One row for each batch and variant."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in prompts.read_text().splitlines()]
    if limit:
        rows = rows[:: max(len(rows) // limit, 1)][:limit]
    params = [SamplingParams(max_tokens, structured=row["structured"]) for row in rows]
    print("| requests at once | | ratio to plain | tokens per verification | from the grammar | same text |")
    print("|---|---|---|---|---|---|")
    for batch in map(int, batches.split(",")):
        llm = LLM(bundle, batch=batch, prefix_cache=False)
        requested = [llm.chat_ids(row["prompt"]) for row in rows]
        tried = variants(llm)
        tried[1].run(llm, requested[:batch], params[:batch])  # warm
        tried = variants(llm)
        for _ in range(rounds):
            for variant in tried:
                variant.run(llm, requested, params)
        plain = tried[0]
        for variant in tried:
            ratio = (variant.tokens / variant.seconds) / (plain.tokens / plain.seconds)
            same = sum(a == b for a, b in zip(variant.texts, plain.texts, strict=True)) / len(plain.texts)
            share = variant.from_grammar / variant.tokens
            cells = [f"{ratio:.2f}", f"{variant.tokens / variant.verifications:.2f}", f"{share:.0%}", f"{same:.0%}"]
            print(f"| {batch} | {variant.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_alone(main)
