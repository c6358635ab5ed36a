"""The results as a terminal table, and as one self-contained HTML file with plots."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from echo_trt_lab.pictures.by_load import accepted_length, drafted, speedup
from echo_trt_lab.pictures.page import Figures, Report

COLUMNS = ("tokens/s", "ratio", "95 %", "accepted length", "of drafts used", "verified", "levels", "spread")


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"simulated on {result['machine']}, K_max {result['budget']}, {result['static']}", title_justify="left"
    )
    shown.add_column("batch", justify="right", style="bold")
    shown.add_column("policy")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    batch = None
    for row in result["results"]:
        if batch not in (None, row["batch"]):
            shown.add_section()
        shown.add_row(str(row["batch"]) if row["batch"] != batch else "", row["policy"], *_cells(row))
        batch = row["batch"]
    return shown


def html_report(result: dict[str, Any]) -> bytes:
    """Render plots and table into one file without scripts or links."""
    rows, recording = result["results"], result["recording"]
    figures = Figures(
        "Figures",
        "Verified: tokens per iteration over all requests. Levels: draft passes per iteration. Spread: tokens an "
        "iteration over requests, standard deviation over mean.",
        ("batch", "policy", *COLUMNS),
        [[str(row["batch"]), row["policy"], *_cells(row)] for row in rows],
        [row["batch"] for row in rows],
        frozenset(("policy",)),
    )
    return Report(
        f"Simulated on {result['machine']}: speculation against plain decoding",
        ["Recorded draft trees, replayed under the policies' own code and this machine's costs; nothing was timed."],
        [speedup(rows), accepted_length(rows), drafted(rows)],
        [figures],
        {
            "recording": f"{recording['answers']:,} answers, {recording['positions']:,} draft trees",
            "K_max": str(result["budget"]),
            "static": result["static"],
            "assumed": "; ".join(result["assumptions"]),
        },
    ).html()


def _cells(row: dict[str, Any]) -> list[str]:
    used = row["draft_utilisation"]
    return [
        f"{row['tokens_per_s']:,.1f}",
        f"{row['ratio']:.3f}x",
        "-".join(f"{bound:.2f}" for bound in row["ratio_interval"]),
        f"{row['accepted_length']:.2f}",
        "-" if used is None else f"{used:.0%}",
        f"{row['verified_per_iteration']:,.1f}",
        f"{row['draft_levels_per_iteration']:.2f}",
        f"{row['progress_spread']:.2f}",
    ]
