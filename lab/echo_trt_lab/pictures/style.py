"""One style of plots: plain numbers at log ticks, a legend above the axes, SVG that suits light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from echo_trt_lab.pictures.palette import GREY, THEMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MARKERS = "osD^vPXp*h"  # lines that lie on one another are told apart by them
WIDE, HALF = (9.6, 4.2), (6.0, 4.0)  # inches: over the whole page, and two beside one another
INK = THEMES["light"]["ink"]
Draw = Callable[..., None]  # of axes, as many as the picture has panels


@dataclass(frozen=True)
class Picture:
    """A plot with its words.

    sentence  what it shows, for a reader who sees it for the first time
    draw      draws it on empty axes
    wide      whether it takes a page's whole width
    panels    axes beside one another, with one y axis
    """

    name: str
    title: str
    sentence: str
    draw: Draw
    wide: bool = False
    panels: int = 1

    def inline(self) -> str:
        """SVG for the inside of an HTML page, in the page's own colour of text."""
        svg = self._svg(INK)
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        svg = _own_ids(svg, self.name)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(self.title)}" ', 1)

    def file(self) -> str:
        """SVG as a file of its own, with its title; its text is a grey that can be read on white and on dark pages."""
        return self._svg(GREY, self.title)

    def _svg(self, ink: str, title: str = "") -> str:
        with styled(ink):
            figure = self.figure(title)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return stream.getvalue()

    def figure(self, title: str = "") -> Figure:
        """Draw it, in the style that is set."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=WIDE if self.wide else HALF, layout="constrained")
        panels = figure.subplots(1, self.panels, sharey=True, squeeze=False)[0]
        self.draw(*panels)
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
        legend_above(figure, panels[0], title)
        return figure


def styled(ink: str = GREY) -> AbstractContextManager[Any]:
    """Set matplotlib's settings for the pictures that are made inside."""
    from matplotlib import rc_context

    text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink)
    return rc_context(
        text
        | {
            "svg.hashsalt": "echo-trt",  # the same picture each time
            "font.size": 12.5,
            "axes.facecolor": "none",
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": ink,
            "grid.alpha": 0.18,
            "lines.linewidth": 2.4,
            "lines.markersize": 6.5,
            "legend.frameon": False,
        }
    )


def legend_above(figure: Figure, axes: Axes, title: str = "") -> None:
    """Put title and legend over the axes, where they can lie on nothing, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    letters = int(10 * figure.get_figwidth())  # of this size in a row, a handle counted as six
    for rows in range(1, len(labels) + 1):  # filled column by column
        columns = [labels[at : at + rows] for at in range(0, len(labels), rows)]
        if sum(max(map(len, column)) + 6 for column in columns) <= letters:
            break
    shape = {"ncols": len(columns), "columnspacing": 1.4, "handlelength": 1.6, "alignment": "left"}
    bold = {"weight": "bold", "size": 14}
    figure.legend(handles, labels, loc="outside upper left", title=title, title_fontproperties=bold, **shape)


def load_axis(axes: Axes, batches: Sequence[int], label: str = "concurrent requests") -> None:
    """Make x a log axis with a tick at every measured load; ``batches`` may have a single one."""
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, sorted(set(batches)))
    axes.set_xlabel(label)
    if len(set(batches)) == 1:
        axes.set_xlim(batches[0] / 2, batches[0] * 2)


def doubling_axis(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Make the axis "x" or "y" logarithmic, with ticks at powers of 2 (4, 8, where there are many) around values."""
    import numpy as np

    axes.set(**{f"{name}scale": "log"})
    low, high = (round_(np.log2(bound)) for round_, bound in ((np.floor, min(values)), (np.ceil, max(values))))
    step = max(1, int(np.ceil((high - low) / 8)))
    axis = axes.xaxis if name == "x" else axes.yaxis
    plain_ticks(axis, [float(2.0**power) for power in np.arange(low, high + step, step)])


def plain_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Put ticks at ``values`` alone, written as 1, 2, 4 and not as powers."""
    axis.set_ticks(list(values), [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def _own_ids(svg: str, name: str) -> str:
    """Drop ids that nothing refers to, and put ``name`` before the others: a page may hold several plots."""
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'((?:xlink:href="|url\()#)', rf"\g<1>{name}-", svg)
