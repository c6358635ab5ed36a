"""Is every policy's text the text of plain decoding, token for token? On real prompts, at several batch sizes.

    python scripts/benchmarks/lossless.py BUNDLE --prompts FILE ... --batch 1,8,32 --max-tokens 128

The bundle should be in fp32. A difference counts as a tie only if the target's logits of the two tokens, after the text
they share, are within 1e-4; it is listed either way. The budget grows with the batch, so that trees are verified at
every size. Exit code 1 if a difference is no tie.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from echo_trt.files.prompts import read_prompts
from echo_trt.runtime.llm import LLM
from echo_trt.runtime.params import SamplingParams
from echo_trt_lab.side_by_side import gap

PLAIN = "autoregressive"
TIE = 1e-4
console = Console()


def main(
    bundle: Path,
    prompts: Annotated[list[Path], typer.Option(help="JSONL files")],
    batch: Annotated[str, typer.Option(help="batch sizes")] = "1,8,32",
    policies: Annotated[str, typer.Option(help="compared with plain decoding")] = "static,dense,fixed,echo,goodput",
    max_tokens: int = 128,
    limit: Annotated[int, typer.Option(help="prompts of each file; 0 for all")] = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    budget: Annotated[int, typer.Option(help="K_max a running request, so that trees do not vanish")] = 4,
    prefix_cache: Annotated[
        bool, typer.Option(help="let policies find the prompts that plain decoding computed")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="write the rows as JSON")] = None,
) -> None:
    """Compare and list."""
    texts = [p.text for file in prompts for p in read_prompts(file)[: limit or None]]
    params = [SamplingParams(max_tokens, temperature, top_p=top_p, seed=i) for i in range(len(texts))]
    rows, broken = [], 0
    for size in map(int, batch.split(",")):
        llm = LLM(bundle, PLAIN, size, prefix_cache=prefix_cache)
        asked = [llm.chat_ids(text) for text in texts]
        plain = [c.token_ids for c in llm.generate(asked, params)]
        for policy in policies.split(","):
            llm.set_policy(policy, budget * size)
            verifications, emitted = llm.counters.verifications, llm.counters.emitted_tokens
            answers = [c.token_ids for c in llm.generate(asked, params)]
            gaps = [gap(llm, ids, a, b) for ids, a, b in zip(asked, plain, answers, strict=True) if a != b]
            broken += sum(gap > TIE for gap in gaps)
            rows.append(
                {
                    "batch": size,
                    "policy": policy,
                    "identical": len(texts) - len(gaps),
                    "requests": len(texts),
                    "ties": sum(gap <= TIE for gap in gaps),
                    "gaps": gaps,
                    "tokens": sum(map(len, answers)),
                    "accepted_length": round(
                        (llm.counters.emitted_tokens - emitted) / (llm.counters.verifications - verifications), 3
                    ),
                }
            )
            console.print(rows[-1])
    _show(rows)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if broken else 0)


def _show(rows: list[dict]) -> None:
    table = Table(title="texts identical to plain decoding")
    for column in ("batch", "policy", "identical", "ties", "tokens", "accepted length"):
        table.add_column(column, justify="right")
    for row in rows:
        identical = f"{row['identical']} of {row['requests']}"
        cells = (row["batch"], row["policy"], identical, row["ties"], f"{row['tokens']:,}", row["accepted_length"])
        table.add_row(*map(str, cells))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
