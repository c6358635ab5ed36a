"""``echo-trt generate --watch``: the draft tree of the latest iteration, drawn beside the text that it brings."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from echo_trt.engine.core import EngineCore, StepTrace
from echo_trt.engine.params import TOKEN_SOURCES, Delta
from echo_trt.speculation.sources import LOOKUP
from echo_trt_lab.sourced_text import HARMLESS, STYLES, SourcedText

FRAMES = 10  # pictures a second at most; larger: a livelier picture, more time taken from decoding
HEIGHT = 22  # lines of the picture at most
SHOWN = HARMLESS | {32: "·", 10: "⏎", 9: "⇥"}  # white space is to be seen
REFUSED, PRUNED = Style(dim=True), Style(dim=True, strike=True)


class TreeDisplay:
    """Shows the text and the tree of one request at a time: the first that is still running."""

    def __init__(self, console: Console, loop: EngineCore, text_of: Callable[[int], str]):
        """Draw on ``console``; ``text_of`` turns a token id into its text."""
        self._console, self._loop, self._text_of = console, loop, text_of
        self._copies = loop.proposer == LOOKUP
        self._texts: dict[int, SourcedText] = {}
        self._ended: set[int] = set()
        self._tree: RenderableType = Text("waiting for the first iteration", REFUSED)
        self._drawn = 0.0
        self._height = min(HEIGHT, max(console.height - 4, 6))
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> TreeDisplay:
        self._live.start()
        self._loop.step_callback = self._see
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.step_callback = None
        self._live.stop()

    def add(self, delta: Delta) -> None:
        self._texts.setdefault(delta.index, SourcedText()).add(delta)
        if delta.completion:
            self._ended.add(delta.index)

    def _see(self, seen: StepTrace) -> None:
        now = time.monotonic()
        open_ = [number for number, request in enumerate(seen.requests) if request not in self._ended]
        if now - self._drawn < 1 / FRAMES or not open_:
            return
        self._drawn, number = now, min(open_, key=lambda number: seen.requests[number])
        lines = tree_lines(seen, number, self._text_of, self._copies)
        self._tree = cut(lines, self._height - 6)
        self._live.update(self._picture(seen, seen.requests[number]), refresh=True)

    def _picture(self, seen: StepTrace, request: int) -> RenderableType:
        text = self._texts.get(request, SourcedText()).styled(harmless=True)
        width = max((self._console.width - 8) // 2, 10)
        tail = Text("\n").join(text.wrap(self._console, width)[-(self._height - 2) :])
        halves = Table.grid(expand=True, padding=0)
        halves.add_column(ratio=1)
        halves.add_column(ratio=1)
        halves.add_row(
            Panel(tail, title="text", height=self._height),
            Panel(Group(self._tree, Text(), figures(seen)), title="tree of the iteration", height=self._height),
        )
        return halves


def figures(seen: StepTrace) -> Text:
    """Return three lines: what the iteration verified, what came of it, and where its time went."""
    iteration, plan = seen.iteration, seen.iteration.plan
    requests, tree = plan.tree.num_requests, len(plan.tree)
    verification_size = f", size {plan.explanation.verification_size}" if plan.explanation.verification_size else ""
    accepted, drafts = int((plan.tree.depth[iteration.path] > 0).sum()), tree - requests
    passes = f"draft {1e3 * seen.drafting:.1f} ms, verify {1e3 * iteration.target.seconds:.1f} ms"
    return Text(
        f"{requests} request{'s' * (requests != 1)}, {tree} tokens verified{verification_size}\n"
        f"{accepted} of {drafts} drafts accepted, {seen.emitted} new tokens\n{passes}",
        REFUSED,
        no_wrap=True,
        overflow="ellipsis",
    )


def tree_lines(seen: StepTrace, number: int, text_of: Callable[[int], str], copies: bool = False) -> list[Text]:
    """Draw the tree of the request at ``number`` in the plan, one line per node, the likeliest child first.

    An accepted node has its source's colour, a refused one is dim, and one that was drafted and not verified is struck
    out. ``copies``: the draft is copied text alone.
    """
    explanation = seen.iteration.plan.explanation
    tree, nodes, chances = explanation.candidates, explanation.nodes, explanation.chances
    verified, accepted = np.zeros(len(tree), bool), np.zeros(len(tree), bool)
    verified[nodes], accepted[nodes[seen.iteration.path]] = True, True
    mine = np.flatnonzero(tree.request == number)
    below: dict[int, list[int]] = {}
    for node in mine[np.lexsort((-chances[mine], ~accepted[mine]))]:
        below.setdefault(int(tree.parent[node]), []).append(int(node))
    lines: list[Text] = []

    def draw(node: int, first: str, others: str) -> None:
        style = REFUSED if verified[node] else PRUNED
        if tree.parent[node] < 0:
            style = Style(bold=True)
        elif accepted[node]:
            source = TOKEN_SOURCES[1 + int(tree.source[node])]
            style = STYLES["lookup" if copies and source == "head" else source]
        line = Text(first, REFUSED).append((text_of(int(tree.token[node])) or "∅").translate(SHOWN), style)
        if tree.parent[node] >= 0:
            line.append(f" {chances[node]:.0%}{' ✓' * bool(accepted[node])}", REFUSED)
        lines.append(line)
        children = below.get(node, [])
        for child in children:
            last = child == children[-1]
            draw(child, others + ("└ " if last else "├ "), others + ("  " if last else "│ "))

    for root in below.get(-1, []):
        draw(root, "", "")
    return lines


def cut(lines: list[Text], height: int) -> Text:
    """Join ``height`` lines: the first ones with a word on those left out, or all of them and empty ones."""
    shown = lines if len(lines) <= height else [*lines[: height - 1], Text(f"{len(lines) - height + 1} more", REFUSED)]
    joined = Text("\n").join([*shown, *[Text()] * (height - len(shown))])
    joined.no_wrap, joined.overflow = True, "ellipsis"
    return joined
