"""Records the demo in a terminal of a fixed width, as an SVG that plays by itself and needs no script."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, NewLine, RenderableType
from rich.control import Control
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI

from echo_trt_lab.demo import demo
from echo_trt_lab.pictures.palette import THEMES
from echo_trt_lab.sourced_text import HARMLESS

ROOT = Path(__file__).parents[3]
COLUMNS, MAX_TOKENS = 104, 96
FRAMES = 60  # pictures that are kept, at most; larger: a smoother film, a larger file
LAST = 9.0  # seconds that the last picture stays
CELL, LINE, SIZE, EDGE = 8.2, 18, 13.6, 14  # pixels: a character's width and a line's height; of the font; around it
THEME = THEMES["dark"]
Lines = list[list[Segment]]


class FilmScreen(Console):
    """A terminal that remembers what was printed on it, apart from what was drawn for a moment."""

    def __init__(self) -> None:
        like = {"width": COLUMNS, "height": 40, "markup": False, "emoji": False, "color_system": "truecolor"}
        super().__init__(file=io.StringIO(), force_terminal=True, no_color=False, _environ={}, **like)
        self.kept: Lines = []

    def print(self, *objects: Any, **more: Any) -> None:
        super().print(*objects, **more)
        if any(isinstance(one, Control | NewLine) for one in objects):  # which move the cursor of a picture
            return
        style = self.get_style(more["style"]) if "style" in more else Style()
        for one in objects or ("",):
            text = self.render_str(one, highlight=more.get("highlight", True)) if isinstance(one, str) else one
            self.kept += self.lines_of(text, style)

    def lines_of(self, picture: RenderableType, style: Style | None = None) -> Lines:
        return self.render_lines(picture, style=style, pad=False)


def record(bundles: Path = ROOT / "bundles", max_tokens: int = MAX_TOKENS) -> str:
    """Run the demo, and return its film; the demo's own failure is one here."""
    screen = FilmScreen()
    film: list[tuple[float, Lines]] = []

    def frame(picture: RenderableType) -> None:
        film.append((screen.get_time(), [*screen.lines_of(picture), *screen.kept]))

    if demo(bundles, max_tokens, screen, frame):
        raise SystemExit("error: texts differ that must not; nothing was recorded.")
    return svg(thinned(film), screen.kept)


def thinned(film: list[tuple[float, Lines]]) -> list[tuple[float, Lines]]:
    """Return ``FRAMES`` pictures at most, with the seconds that each is seen."""
    step = -(-len(film) // FRAMES) or 1
    kept = film[::step]
    ends = [when for when, _ in kept[1:]] + [film[-1][0] + 0.1] if kept else []
    return [(end - when, lines) for (when, lines), end in zip(kept, ends, strict=True)]


def svg(film: list[tuple[float, Lines]], last: Lines) -> str:
    """Draw the pictures one after another, and ``last`` at the end; a viewer that plays nothing shows that one."""
    film = [*film, (LAST, last)]
    total, begin, frames = sum(seconds for seconds, _ in film), 0.0, []
    texts: dict[str, str] = {}
    for number, (seconds, lines) in enumerate(film):
        uses = []
        for row, line in enumerate(lines):
            drawn = _line(line)
            if drawn:
                name = texts.setdefault(drawn, f"l{len(texts)}")
                uses.append(f'<use href="#{name}" y="{LINE * (row + 1)}"/>')
        is_last = number == len(film) - 1
        times = [0.0, begin / total, (begin + seconds) / total]
        values = ["none", "inline", "none"]
        if is_last:
            times, values = times[:2], values[:2]
        if begin == 0:
            times, values = times[1:], values[1:]
        play = (
            f'<animate attributeName="display" dur="{total:.2f}s" repeatCount="indefinite" calcMode="discrete" '
            f'values="{";".join(values)}" keyTimes="{";".join(f"{time:.5f}" for time in times)}"/>'
        )
        if len(film) == 1:
            play = ""
        display = "" if is_last else ' display="none"'
        frames.append(f'<g class="{"last" if is_last else "frame"}"{display}>{play}{"".join(uses)}</g>')
        begin += seconds
    rows = max(len(lines) for _, lines in film)
    width, height = COLUMNS * CELL + 2 * EDGE, rows * LINE + 2 * EDGE
    defs = "".join(f'<g id="{name}">{drawn}</g>' for drawn, name in texts.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xml:space="preserve" viewBox="0 0 {width:.0f} {height:.0f}" '
        'role="img" aria-label="A recording of scripts/demo: plain decoding and speculation answer the same prompts">\n'
        f"<style>text {{ font: {SIZE}px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; "
        f"fill: {THEME['ink']}; white-space: pre }}\n"
        "@media (prefers-reduced-motion: reduce) { .frame { display: none !important } "
        ".last { display: inline !important } }</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="{THEME["paper"]}"/>\n'
        f'<defs>{defs}</defs>\n<g transform="translate({EDGE} {EDGE - 4})">\n' + "\n".join(frames) + "\n</g>\n</svg>\n"
    )


def _line(segments: list[Segment]) -> str:
    """Draw a line's pieces, each as wide as its characters are in a terminal."""
    x, pieces = 0.0, []
    for text, style, control in segments:
        cells = Segment(text, style).cell_length
        if text.strip() and not control:
            skipped = len(text) - len(text.lstrip())
            shown = text.strip().translate(HARMLESS)
            length = Segment(shown).cell_length * CELL
            pieces.append(
                f'<text x="{x + skipped * CELL:.1f}" textLength="{length:.1f}"{_look(style)}>{escape(shown)}</text>'
            )
        x += cells * CELL
    return "".join(pieces)


def _look(style: Style | None) -> str:
    if not style:
        return ""
    css = []
    if style.color and not style.color.is_default:
        css.append("fill:" + style.color.get_truecolor(DIMMED_MONOKAI).hex)
    css += [rule for wanted, rule in (
        (style.bold, "font-weight:bold"),
        (style.italic, "font-style:italic"),
        (style.underline, "text-decoration:underline"),
        (style.strike, "text-decoration:line-through"),
        (style.dim, "opacity:.6"),
    ) if wanted]  # fmt: skip
    return f' style="{";".join(css)}"' if css else ""
