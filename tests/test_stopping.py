"""Signals that ask a command to stop, and one that nohup has ignored."""

from __future__ import annotations

import signal

import pytest

from echo_trt import __main__ as command
from echo_trt.stopping import stop_signals


@pytest.fixture(autouse=True)
def _handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_closed_terminal_stops_a_command_unless_nohup_has_it_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert stop_signals() == (signal.SIGTERM, signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert stop_signals() == (signal.SIGTERM,)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_command_that_is_stopped_cleans_up(number, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    cleaned = []

    def run() -> None:
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(number)

    monkeypatch.setattr("echo_trt.cli.main", run)
    with pytest.raises(SystemExit) as done:
        command.main()
    assert (done.value.code, cleaned) == (128 + number, [number])
