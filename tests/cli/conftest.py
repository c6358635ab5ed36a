"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from echo_trt.cli.app import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def echo_trt(capsys, monkeypatch) -> Callable[..., Outcome]:
    monkeypatch.setenv("COLUMNS", "400")  # no table and no sentence is wrapped

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["echo-trt", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return Outcome(done.value.code or 0, *capsys.readouterr())

    return run
