"""Tables of results on a terminal, in a file or a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(out: Console, table: Table) -> None:
    """Print a table whole: in a file or a pipe, no terminal's width cuts it."""
    if not out.is_terminal:
        unbounded = out.options.update(max_width=10_000)
        out.width = max(out.width, Measurement.get(out, unbounded, table).maximum)
    out.print(table)
