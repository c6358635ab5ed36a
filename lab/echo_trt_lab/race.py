"""Plain decoding and speculation side by side: each on a clock of its own, in short turns on the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from echo_trt.backends.kind import computes_in
from echo_trt.cli.generate import GenerateRun, results
from echo_trt.engine.kv_blocks import blocks_for
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Delta, SamplingParams
from echo_trt.speculation.policy_names import DEFAULT, PLAIN
from echo_trt_lab.pictures.palette import BLUE, GREY
from echo_trt_lab.side import Side
from echo_trt_lab.side_by_side import gap, side_by_side

SLICE = 0.2  # seconds of a turn; larger: a machine that changes its speed meanwhile favours one side more
FRAMES = 10  # pictures a second at most, whose time is on no side's clock; larger: a slower command
LINES = 9  # text lines of a pane
BAR = 24  # characters of the slower side's bar
NAME = 14  # characters of a prompt's name; a longer name is cut
Frame = Callable[[RenderableType], None]


def sides_of(
    llm: LLM, policies: Sequence[str], prompts: Sequence[Sequence[int]], limit: int, budget: int | None = None
) -> list[Side]:
    """Make a side for each policy.

    Where the prompts fit into a part of the KV pool, a side gets its own loop over a part, and sides can take turns.

    prompts  token ids of all prompts of the race
    limit    new tokens of an answer, at most
    """
    batch = llm.loop.batch
    longest = sorted(map(len, prompts))[-batch.count :]
    needed = sum(blocks_for(min(length + limit, batch.context) + batch.reserve) for length in longest)
    if not llm.networks.target.paged or needed > batch.blocks.count // len(policies):
        return [Side(policy) for policy in policies]
    loops = side_by_side(llm, policies, budget)
    return [Side(policy, loop) for policy, loop in zip(policies, loops, strict=True)]


def race(
    llm: LLM,
    sides: Sequence[Side],
    ids: Sequence[str],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    show: Callable[[Delta], None] = lambda delta: None,
    budget: int | None = None,
) -> None:
    """Let all sides answer ``prompts`` once. The next turn goes to the one whose clock of this round shows least."""
    together = all(side.loop for side in sides)
    if together:
        for side in sides:
            side.begin(llm, ids, prompts, params)
    for side in () if together else sides:
        llm.set_policy(side.policy, budget)
        side.begin(llm, ids, prompts, params)
        while side.busy:
            side.run(SLICE, show)
    while running := [side for side in sides if side.busy]:
        min(running, key=lambda side: side.seconds - side.begun).run(SLICE, show)


class Panes:
    """The sides' texts beside one another while they are written, on a terminal; elsewhere nothing."""

    def __init__(
        self,
        console: Console,
        sides: Sequence[Side],
        coloured: bool,
        frame: Frame = lambda picture: None,
    ):
        """``frame`` gets every picture that is drawn."""
        self._console, self._sides, self._coloured, self._frame = console, sides, coloured, frame
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._drawn = 0.0

    def __enter__(self) -> Panes:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, delta: Delta) -> None:
        """Draw how far the sides are, if the last picture is old enough."""
        now = time.monotonic()
        if self._live and now - self._drawn >= 1 / FRAMES:
            self._drawn, picture = now, self.picture()
            self._live.update(picture, refresh=True)
            self._frame(picture)

    def picture(self) -> RenderableType:
        row, width = Table.grid(expand=True), max(self._console.width // len(self._sides) - 4, 10)
        for _ in self._sides:
            row.add_column(ratio=1)
        row.add_row(*(self._pane(side, width) for side in self._sides))
        return row

    def _pane(self, side: Side, width: int) -> Panel:
        text = Text()
        if side.texts:
            text = side.texts[0].styled(harmless=True)
            text = text if self._coloured else Text(text.plain)
        tail = Text("\n").join(text.wrap(self._console, width)[-LINES:])
        seconds = side.seconds - side.begun
        more = f", {len(side.texts)} requests" if len(side.texts) > 1 else ""
        title = f"{name_of(side.policy)}{more}  {seconds:.1f} s  {side.tokens / max(seconds, 1e-9):.0f} tokens/s"
        return Panel(tail, title=title, height=LINES + 2, border_style="default" if side.busy else "green")


def name_of(policy: str) -> str:
    """Return a policy's name for readers of a race."""
    return "plain" if policy == PLAIN else policy


def result_lines(name: str, sides: Sequence[Side], console: Console) -> list[Text]:
    """Return two lines of a prompt: seconds and tokens/s of both sides, as bars; and whether they wrote the same."""
    plain, other = sides
    slowest, lines = max(side.ended[name] for side in sides), []
    colours = console.color_system is not None and not console.no_color
    for side, colour in zip(sides, (GREY, BLUE), strict=True):
        seconds, completion = side.ended[name], side.completions[name]
        bar = round(BAR * seconds / slowest) * ("=" if console.options.ascii_only else "━")
        line = Text(f"{name[:NAME] if side is plain else '':<{NAME}} {name_of(side.policy):<13} ")
        line.append(f"{seconds:6.2f} s {len(completion.token_ids) / seconds:5.0f} tokens/s ")
        line.append(f"{bar:<{BAR}}", colour if colours else "")
        if side is other:
            same = plain.completions[name].token_ids == completion.token_ids
            line.append(f" {plain.ended[name] / seconds:.2f}x", "bold")
            line.append(", same text" if same else ", another text", "" if same else "yellow")
        line.rstrip()
        lines.append(line)
    return lines


NEARLY_NONE = 1.05  # tokens per pass; larger: more races are called undrafted


def meaning(plain: dict[str, Any], other: dict[str, Any]) -> str:
    """Say in one sentence what a comparison's two rows mean."""
    ratio, same = other["tokens_per_s"] / max(plain["tokens_per_s"], 1e-9), other["identical"]
    speed = f"{ratio:.2f} times as fast" if ratio >= 1 else f"at {ratio:.2f} times the speed"
    came = f"The same texts came {speed}"
    if same < other["requests"]:
        came = f"{same} of {other['requests']} texts were the same, and all came {speed}"
    if other["accepted_length"] < NEARLY_NONE:
        return (
            f"{came}: next to nothing was drafted, since passes took too long beside other work; run it again while "
            "nothing else runs."
        )
    return (
        f"{came}: a pass of the target brought {other['accepted_length']:.1f} tokens of a request instead of "
        f"{plain['accepted_length']:.0f}, since it also checks drafts, and keeps those that it would have written."
    )


def run(job: GenerateRun, llm: LLM, policy: str, out: Console, messages: Console) -> dict[str, Any]:
    """Answer everything twice, side by side, in rounds of as many prompts as run at once."""
    rows, sides = compare(job, llm, policy, out)
    plain, other = rows
    if len(job.prompts) == 1:
        for side in sides[: 2 - other["identical"]]:  # once, where both wrote the same
            out.print(side.completions[job.prompts[0].id].text, highlight=False, soft_wrap=True)
    out.print()
    out.print(comparison_table(rows, plain))
    out.print(meaning(plain, other), highlight=False)
    if other["logit_gaps"]:
        out.print(rounding_note(other["logit_gaps"], computes_in(llm.manifest)), highlight=False)
    ratio = other["tokens_per_s"] / plain["tokens_per_s"]
    return {
        "results": results(job, sides[1].completions),
        "summary": {**other, "ratio": round(ratio, 4)},
        "plain": plain,
    }


def compare(
    job: GenerateRun, llm: LLM, policy: str, out: Console, lines: bool = True, frame: Frame = lambda picture: None
) -> tuple[list[dict[str, Any]], list[Side]]:
    """Race plain decoding against ``policy``, of plain decoding goodput. Returns a row a side, and the sides.

    lines  whether two lines per prompt are printed
    frame  gets every picture that is drawn
    """
    policies = PLAIN, policy if policy != PLAIN else DEFAULT
    prompts = [llm.chat_ids(prompt.text) for prompt in job.prompts]
    sides = sides_of(llm, policies, prompts, job.params.max_tokens, job.budget)
    params, size = replace(job.params, token_sources=True), llm.loop.batch.count
    for begin in range(0, len(prompts), size):
        ids = [prompt.id for prompt in job.prompts[begin : begin + size]]
        with Panes(out, sides, job.coloured, frame) as panes:
            race(llm, sides, ids, prompts[begin : begin + size], params, panes.show, job.budget)
        for name in ids if lines else ():
            for line in result_lines(name, sides, out):
                out.print(line, highlight=False, soft_wrap=True)
    return [_row(llm, job, sides[0], side) for side in sides], sides


def _row(llm: LLM, job: GenerateRun, plain: Side, side: Side) -> dict[str, Any]:
    """Make a side's row: its summary, texts equal to plain decoding's, and where others part, by how much."""
    pairs = [(p, plain.completions[p.id].token_ids, side.completions[p.id].token_ids) for p in job.prompts]
    apart = [(p, first, second) for p, first, second in pairs if first != second]
    gaps = {p.id: round(gap(llm, llm.chat_ids(p.text), first, second), 4) for p, first, second in apart}
    return {**side.summary(), "identical": len(pairs) - len(gaps), "logit_gaps": gaps}


def comparison_table(rows: list[dict], plain: dict) -> Table:
    """``rows``: policy, tokens_per_s, accepted_length, identical, requests."""
    table = Table(title="plain decoding against speculation")
    for column in ("policy", "tokens/s", "ratio", "accepted length", "identical texts"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        table.add_row(
            row["policy"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / plain['tokens_per_s']:.2f}x",
            f"{row['accepted_length']:.2f}",
            f"{row['identical']} of {row['requests']}",
        )
    return table


def rounding_note(gaps: dict[str, float], precision: str) -> str:
    """Why texts differ: the two tokens' logits, where a text first parts from plain decoding's."""
    listed = ", ".join(f"{name} {gap:.3g}" for name, gap in gaps.items())
    return (
        f"Where a text parts from plain decoding's, the target's logits of the two tokens differ by: {listed}. "
        f"{precision} rounds a token alike only in calls of one shape, so such near-ties can fall either way; "
        "for texts that are identical token for token build with --precision fp32, or decode one path per request "
        "(--policy goodput-exact), which a CPU computes with plain decoding's own rounding."
    )
