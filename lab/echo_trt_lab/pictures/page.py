"""A report: plots with a sentence each, then tables, in one HTML file without scripts and links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader

from echo_trt_lab.pictures.palette import stylesheet
from echo_trt_lab.pictures.style import Picture


@dataclass(frozen=True)
class Figures:
    """A table of a report.

    columns  heads
    rows     cells [rows][columns], ready to be shown
    groups   [rows], what a row belongs to: a line divides two groups
    words    columns of words, which are aligned to the left
    """

    title: str
    sentence: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[Any] = ()
    words: frozenset[str] = frozenset()

    def without_constants(self, keep: frozenset[str] = frozenset()) -> tuple[Figures, dict[str, str]]:
        """Take out columns in which all rows say the same, and return what they say; ``keep`` stay."""
        alike = {
            name: self.rows[0][at]
            for at, name in enumerate(self.columns)
            if name not in keep and len(self.rows) > 1 and len({row[at] for row in self.rows}) == 1
        }
        kept = [at for at, name in enumerate(self.columns) if name not in alike]
        rows = [[row[at] for at in kept] for row in self.rows]
        columns = [self.columns[at] for at in kept]
        constant = {name: value for name, value in alike.items() if value}
        return Figures(self.title, self.sentence, columns, rows, self.groups, self.words), constant

    def lines(self) -> list[tuple[bool, Sequence[str]]]:
        """Return rows, and whether each begins a group."""
        groups = self.groups or [None] * len(self.rows)
        return [(at > 0 and groups[at] != groups[at - 1], row) for at, row in enumerate(self.rows)]


@dataclass(frozen=True)
class Report:
    """``title`` and ``lead`` say what was measured; ``facts`` hold once what would stand in every row."""

    title: str
    lead: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Figures]
    facts: dict[str, str] = field(default_factory=dict)

    def html(self) -> bytes:
        environment = Environment(loader=PackageLoader("echo_trt_lab.pictures", "."), autoescape=True)
        environment.trim_blocks = environment.lstrip_blocks = True
        return environment.get_template("page.html.j2").render(report=self, palette=stylesheet()).encode()
