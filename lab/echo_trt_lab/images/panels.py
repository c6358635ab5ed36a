"""Draws a Grafana dashboard's panels from its JSON and from what a Prometheus answered to their queries."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from echo_trt_lab.pictures.palette import AMBER, BLUE, GREEN, GREY, OLIVE, PINK, PURPLE, RED, TEAL, THEMES
from echo_trt_lab.pictures.style import styled

THEME = THEMES["dark"]  # Grafana's own
WIDTH, UNIT = 16.0, 0.34  # inches of the picture, and of a grid row
COLUMNS = 24  # of Grafana's grid
CYCLE = (BLUE, AMBER, GREEN, PURPLE, PINK, TEAL, OLIVE, RED)
THRESHOLDS = {"green": GREEN, "orange": AMBER, "red": RED, "blue": BLUE}
#: A query's answer: labels, and (seconds since the epoch, value) of each series.
Series = list[tuple[dict[str, str], list[tuple[float, float]]]]


def draw(dashboard: dict[str, Any], answers: dict[str, Series]) -> bytes:
    """Return a PNG; ``answers`` has the series of each query, "PANEL ID/refId"."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    with styled(THEME["soft"]):
        figure = Figure(figsize=(WIDTH, rows * UNIT), facecolor=THEME["paper"])
        height = figure.get_figheight()

        def index(panel: dict[str, Any], left: float, below: float, right: float, above: float) -> list[float]:
            """Return the panel's rectangle in figure coordinates, within margins in inches."""
            grid, column = panel["gridPos"], WIDTH / COLUMNS
            x, w = grid["x"] * column + left, grid["w"] * column - left - right
            y, h = height - (grid["y"] + grid["h"]) * UNIT + below, grid["h"] * UNIT - below - above
            return [x / WIDTH, y / height, w / WIDTH, h / height]

        for panel in panels:
            if panel["type"] == "row":
                x, y, _, h = index(panel, 0.08, 0, 0, 0)
                figure.text(x, y + h / 2, panel["title"], color=THEME["ink"], weight="bold", va="center", fontsize=11)
                continue
            card = figure.add_axes(index(panel, 0.04, 0.04, 0.04, 0.04), facecolor=THEME["card"])
            card.set(xticks=[], yticks=[])
            card.spines[:].set_color(THEME["line"])
            lines = [
                (_name(target, labels), points)
                for target in panel["targets"]
                for labels, points in answers.get(f"{panel['id']}/{target['refId']}", [])
            ]
            (_stat if panel["type"] == "stat" else _timeseries)(figure, index, panel, card, lines)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=75, facecolor=THEME["paper"])
    return stream.getvalue()


Curves = list[tuple[str, list[tuple[float, float]]]]


def _timeseries(figure: Figure, index: Callable, panel: dict[str, Any], card: Any, lines: Curves) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    _title(card, panel)
    axes = figure.add_axes(index(panel, 0.62, 0.62, 0.16, 0.36), facecolor="none")
    first = min((points[0][0] for _, points in lines if points), default=0.0)
    for at, (name, points) in enumerate(lines):
        xs = [(when - first) / 60 for when, _ in points]
        ys = [value for _, value in points]
        axes.plot(xs, ys, color=CYCLE[at % len(CYCLE)], linewidth=1.3, label=name)
        axes.fill_between(xs, ys, color=CYCLE[at % len(CYCLE)], alpha=0.08, linewidth=0)
    axes.set_ylim(0, None if any(value > 0 for _, points in lines for _, value in points) else 1)
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, unit))
    axes.tick_params(labelsize=8, length=0)
    axes.locator_params(nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    axes.spines[:].set_visible(False)
    if lines:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.16), ncols=min(len(lines), 6), fontsize=8, handlelength=1,
            columnspacing=1, borderaxespad=0, handletextpad=0.5,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color=GREY)


def _title(card: Any, panel: dict[str, Any]) -> None:
    card.annotate(panel["title"], (0, 1), (8, -8), xycoords="axes fraction", textcoords="offset points", va="top",
                  color=THEME["ink"], fontsize=10)  # fmt: skip


def _stat(figure: Figure, index: Callable, panel: dict[str, Any], card: Any, lines: Curves) -> None:
    if panel["options"]["textMode"] == "name":
        _title(card, panel)
        names = ", ".join(name for name, _ in lines)
        card.text(0.5, 0.45, names, transform=card.transAxes, ha="center", va="center", color=BLUE, fontsize=18)
        return
    defaults, value = panel["fieldConfig"]["defaults"], None
    for _, points in lines:
        value = points[-1][1]
    colour = GREY
    for step in defaults["thresholds"]["steps"]:
        if value is not None and (step["value"] is None or value >= step["value"]):
            colour = THRESHOLDS[step["color"]]
    card.set_facecolor(colour)
    text = "no data" if value is None else shown(value, defaults["unit"], defaults.get("decimals"))
    card.text(0.5, 0.42, text, transform=card.transAxes, ha="center", va="center", color="white", fontsize=21,
              weight="bold")  # fmt: skip
    card.text(0.5, 0.83, panel["title"], transform=card.transAxes, ha="center", va="center", color="white", fontsize=10)


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """Write a value in its unit, as Grafana does."""
    if value != value:
        return "no requests"
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    suffix = {"reqps": " req/s", "ops": " ops/s"}.get(unit, "")
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k{suffix}"
    return (f"{value:.{decimals}f}" if decimals is not None else f"{value:.3g}") + suffix


def _name(target: dict[str, Any], labels: dict[str, str]) -> str:
    name = target["legendFormat"]
    for label, value in labels.items():
        name = name.replace("{{" + label + "}}", value)
    return name


def empty(dashboard: dict[str, Any], answers: dict[str, Series]) -> Sequence[str]:
    """Return the queries that had no answer."""
    return [
        f"{panel['title']}: {target['expr']}"
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        if not answers.get(f"{panel['id']}/{target['refId']}")
    ]
