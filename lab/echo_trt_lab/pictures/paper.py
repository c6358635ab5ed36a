"""Plots of docs/paper.md, of the rows that scripts/benchmarks/paper.py simulates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from echo_trt_lab.pictures.by_load import Rows
from echo_trt_lab.pictures.palette import GREY, colours_of
from echo_trt_lab.pictures.style import MARKERS, Picture, load_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("echo", "fixed", "dense")


def pictures(rows: Rows, fits: dict[str, int], names: dict[str, str]) -> list[Picture]:
    """Draw the ratio and the used share over K_max, and drafts by load: a panel for each machine of ``fits``."""
    first, maximum = rows[0]["answers"], max(row["batch"] for row in rows)
    calibrated = [row for row in rows if row["answers"] == first and row["gates"] == "calibrated"]
    swept = [row for row in calibrated if row["levels"] == "high" and row["batch"] == maximum]
    by_load = [row for row in calibrated if row["levels"] == "low"]

    def panels(
        rows: Rows, x: str, y: Callable[[dict[str, Any]], float], label: str, line: float | None
    ) -> Callable[..., None]:
        def draw(*all_axes: Axes) -> None:
            for axes, (machine, fit) in zip(all_axes, fits.items(), strict=True):
                if line is not None:
                    axes.axhline(line, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6, label="plain decoding")
                for at, (policy, colour) in enumerate(colours_of(list(LINES)).items()):
                    found = [row for row in rows if row["machine"] == machine and row["policy"] == policy]
                    if x == "batch":  # the K_max of the tables by load
                        at_one = min(found, key=lambda row: row["batch"], default={})
                        found = [row for row in found if row["budget"] == at_one["budget"]]
                    points = sorted((row[x], y(row)) for row in found)
                    if points:
                        axes.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[at], label=policy)
                load_axis(axes, [row[x] for row in rows])
                axes.set_title(f"{names.get(machine, machine)}; our fit {fit:,}", fontsize=12.5)
                if x == "budget":
                    axes.set_xlabel(f"K_max, tokens, at {maximum} requests")
            all_axes[0].set(ylabel=label, ylim=(0, None))

        return draw

    count, ratio = len(fits), panels(swept, "budget", lambda row: row["over"]["plain"][0], "times plain decoding", 1)
    used = panels(by_load, "batch", _used, "tokens verified over K_max", None)
    depth = panels(by_load, "batch", lambda row: row["draft_levels_per_iteration"], "draft passes per iteration", None)
    return [
        Picture("paper-budget", "Speedup by K_max", "3 levels, top-k 3.", ratio, wide=True, panels=count),
        Picture("paper-used", "Share of K_max that is used", "8 levels, top-k 10.", used, wide=True, panels=count),
        Picture("paper-depth", "Depth by load", "8 levels, top-k 10.", depth, wide=True, panels=count),
    ]


def _used(row: dict[str, Any]) -> float:
    return row["verified_per_iteration"] / row["budget"]
