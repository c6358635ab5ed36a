"""Signals that ask a command to stop, and one that nohup has ignored."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from echo_trt.supervision.stopping import stop_signals

STOPPED = """
import signal
import echo_trt.cli.app
from echo_trt.__main__ import main

def run():
    try:
        signal.raise_signal(signal.{name})
    finally:
        print("cleaned up")

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which these tests may run, ignores it
echo_trt.cli.app.main = run
main()
"""


@pytest.mark.parametrize(
    ("hangup", "signals"),
    [(signal.SIG_DFL, (signal.SIGTERM, signal.SIGHUP)), (signal.SIG_IGN, (signal.SIGTERM,))],
)
def test_a_closed_terminal_stops_a_command_unless_nohup_has_it_ignored(hangup, signals, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: hangup}.get)
    assert stop_signals() == signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_command_that_is_stopped_cleans_up(number):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED.format(name=number.name)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (128 + number, "cleaned up"), done.stderr
