"""What scripts/demo shows: plain decoding and speculation race on the default pair, and their texts are compared.

    python -m echo_trt_lab.demo [--max-tokens N]

The first race is drawn: two panes on a terminal, two lines per prompt elsewhere. Texts of the other two must be equal
to plain decoding's token for token: exit code 1 if one is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from echo_trt.backends.kind import computes_in
from echo_trt.cli.generate import GenerateRun
from echo_trt.cli.terminal import wants_colour
from echo_trt.engine.llm import LLM
from echo_trt.engine.options import bounds, run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.files.prompts import read_prompts
from echo_trt_lab.race import compare, meaning, rounding_note
from echo_trt_lab.sourced_text import legend

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "scripts" / "demo_prompts.jsonl"


@dataclass(frozen=True)
class Race:
    """``exact``: texts are promised to be plain decoding's, token for token."""

    bundle: str
    policy: str
    batch: int
    exact: bool


RACES = (
    Race("smollm2-135m", "goodput", 1, False),
    Race("smollm2-135m", "goodput-exact", 1, True),
    Race("smollm2-135m-fp32", "goodput", 2, True),
)


def main(
    max_tokens: Annotated[int, Parameter(validator=bounds(2), help="New tokens per prompt, at most.")] = 96,
    bundles: Annotated[Path, Parameter(help="The folder of both bundles.")] = ROOT / "bundles",
) -> None:
    raise SystemExit(demo(bundles, max_tokens, Console(markup=False, emoji=False)))


def demo(
    bundles: Path, max_tokens: int, out: Console, frame: Callable[[RenderableType], None] = lambda picture: None
) -> int:
    """Run all races and print what came of them. Returns the exit code; ``frame`` gets every picture of the first."""
    coloured, prompts = wants_colour(out, "auto"), read_prompts(PROMPTS)
    table = Table(title="Tokens per second", title_justify="left", box=SIMPLE_HEAD)
    for column in ("policy, precision, load", "plain decoding", "with drafts", "speedup", "same text"):  # in 80 columns
        table.add_column(column, justify="right" if table.columns else "left")
    rows: list[tuple[Race, dict[str, Any], dict[str, Any]]] = []
    notes, broken = [], []
    for number, one in enumerate(RACES):
        llm = LLM(bundles / one.bundle, one.policy, one.batch, prefix_cache=False)
        llm.generate(
            [llm.chat_ids(prompts[0].text)], SamplingParams(max_tokens)
        )  # functions are compiled at first calls
        job = GenerateRun(prompts, SamplingParams(max_tokens), coloured=coloured)
        first = number == 0
        (plain, other), sides = compare(job, llm, one.policy, out, first, frame if first else lambda picture: None)
        rows.append((one, plain, other))
        computed, same = computes_in(llm.manifest), f"{other['identical']} of {other['requests']}"
        ratio = f"{other['tokens_per_s'] / plain['tokens_per_s']:.2f}x"
        load = "1 request" if one.batch == 1 else f"{one.batch} at once"
        speeds = f"{plain['tokens_per_s']:.0f}", f"{other['tokens_per_s']:.0f}"
        table.add_row(f"{one.policy}, {computed}, {load}", *speeds, ratio, same)
        if first and coloured:
            out.print(legend(sides[1].counts), highlight=False, soft_wrap=True)
        if other["logit_gaps"]:
            (broken if one.exact else notes).append(rounding_note(other["logit_gaps"], computed))
    out.print()
    out.print(table)
    out.print(meaning(*rows[0][1:]), highlight=False)
    for note in notes:
        out.print(note, highlight=False)
    for note in broken:
        out.print(f"error: texts differ that must not. {note}", style="bold red", highlight=False)
    return 1 if broken else 0


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    run_alone(main)
