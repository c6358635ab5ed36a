"""Plain decoding and speculation side by side: each on a clock of its own, in short turns on the same machine."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from echo_trt.commands.sources import SourcedText
from echo_trt.decoding.policy_names import PLAIN
from echo_trt.pictures.palette import BLUE, GREY
from echo_trt.runtime.llm import LLM
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.params import Completion, Delta, SamplingParams
from echo_trt.runtime.slots import blocks_for

SLICE = 0.2  # seconds of a turn; larger: a machine that changes its speed meanwhile favours one side more
FRAMES = 10  # pictures a second at most, whose time is on no side's clock; larger: a slower command
LINES = 9  # text lines of a pane
BAR = 24  # characters of the slower side's bar
NAME = 14  # characters of a prompt's name; a longer name is cut


@dataclass
class Side:
    """One policy's part: its answers, and seconds on a clock that stands still while the other side runs.

    loop      of ``LLM.side_by_side``; None: the LLM's own, in which sides run one after another
    ended     id -> seconds from the round's begin to the answer's end
    """

    policy: str
    loop: Loop | None = None
    seconds: float = 0.0
    completions: dict[str, Completion] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    verifications: int = 0
    emitted: int = 0
    texts: list[SourcedText] = field(default_factory=list)
    begun: float = 0.0
    busy: bool = False
    _rounds: list[list[SourcedText]] = field(default_factory=list)

    def begin(self, llm: LLM, ids: Sequence[str], prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """Begin a round: answers to ``prompts``, all at once."""
        loop = self.loop or llm.loop
        self._ids, self._loop, self._deltas = ids, loop, self._counted(loop, llm.stream(prompts, params, loop))
        self.texts, self.begun, self.busy = [SourcedText() for _ in ids], self.seconds, True
        self._rounds.append(self.texts)

    def run(self, seconds: float, show: Callable[[Delta], None]) -> None:
        """Run for ``seconds``, at least until the next piece of text, or to the round's end.

        ``show`` gets every piece of text; its time is not on the clock.
        """
        end = self.seconds + seconds
        while self.busy:
            before = time.perf_counter()
            delta = next(self._deltas, None)
            self.seconds += time.perf_counter() - before
            self.busy = delta is not None
            if delta is not None:
                self._take(delta)
                show(delta)
            if self.seconds >= end:
                break

    def _take(self, delta: Delta) -> None:
        self.texts[delta.index].add(delta)
        if delta.completion:
            name = self._ids[delta.index]
            self.completions[name], self.ended[name] = delta.completion, self.seconds - self.begun

    def _counted(self, loop: Loop, deltas: Iterator[Delta]) -> Iterator[Delta]:
        counters = loop.counters
        before = counters.verifications, counters.emitted_tokens
        yield from deltas
        self.verifications += counters.verifications - before[0]
        self.emitted += counters.emitted_tokens - before[1]

    @property
    def tokens(self) -> int:
        """Tokens of the round so far."""
        return sum(text.counts.total() for text in self.texts)

    @property
    def counts(self) -> Counter[str]:
        """Tokens of all rounds by their source, where requests ask for them."""
        return sum((text.counts for texts in self._rounds for text in texts), Counter())

    def summary(self) -> dict[str, Any]:
        tokens = sum(len(c.token_ids) for c in self.completions.values())
        return {
            "policy": self.policy,
            "requests": len(self.completions),
            "tokens": tokens,
            "seconds": round(self.seconds, 4),
            "tokens_per_s": round(tokens / self.seconds, 2) if self.seconds else 0.0,
            "accepted_length": round(self.emitted / self.verifications, 4) if self.verifications else 0.0,
        }


def sides_of(
    llm: LLM, policies: Sequence[str], prompts: Sequence[Sequence[int]], limit: int, budget: int | None = None
) -> list[Side]:
    """Make a side for each policy.

    Where the prompts fit into a part of the KV pool, a side gets its own loop over a part, and sides can take turns.

    prompts  token ids of all prompts of the race
    limit    new tokens of an answer, at most
    """
    state = llm.loop.state
    longest = sorted(map(len, prompts))[-state.count :]
    needed = sum(blocks_for(min(length + limit, state.context) + state.reserve) for length in longest)
    if state.linear or needed > state.num_blocks // len(policies):
        return [Side(policy) for policy in policies]
    loops = llm.side_by_side(policies, budget)
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
        frame: Callable[[RenderableType], None] = lambda picture: None,
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


NEARLY_NONE = 1.05  # tokens a pass; larger: more races are called undrafted


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
