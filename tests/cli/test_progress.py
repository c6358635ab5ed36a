"""What a first start says while it compiles: one line, late, and gone from a terminal afterwards."""

from __future__ import annotations

import io

import pytest
from numba import njit
from rich.console import Console

from echo_trt.cli import progress
from echo_trt.cli.progress import COMPILING, loading


def compile_one(number: int) -> None:
    njit("i8(i8)")(lambda value: value + number)


def said(monkeypatch, patience: float, compiled: int, terminal: bool) -> str:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    for _ in range(2):  # the command line's modules, then the engine's
        with loading(console):
            for number in range(compiled):
                compile_one(number)
    compile_one(0)  # numba's colorama keeps the last standard output that it saw: not the status's
    return console.file.getvalue()


@pytest.mark.parametrize(("patience", "compiled", "times"), [(0.0, 3, 1), (0.0, 0, 0), (1e9, 3, 0)])
def test_a_log_has_one_line_where_compiling_takes_long(monkeypatch, patience, compiled, times):
    assert said(monkeypatch, patience, compiled, terminal=False) == f"{COMPILING}\n" * times


def test_a_terminal_forgets_it(monkeypatch):
    text = said(monkeypatch, 0.0, 3, terminal=True)
    assert COMPILING in text
    assert text.rindex("\x1b[2K") > text.rindex(COMPILING)  # the line is erased, and nothing follows
    assert text.endswith(("\x1b[2K", "\x1b[?25h"))
    assert COMPILING not in said(monkeypatch, 1e9, 3, terminal=True)
