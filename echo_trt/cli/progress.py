"""How far a build is, on a terminal: its stage and, where the compiler says so, a bar. Elsewhere one line per stage."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from echo_trt.supervision.stopping import stop_signals

COMPILING = "compiling functions for this CPU, once: this may take a minute"
PATIENCE = 1.0  # seconds of compiling that nothing is said of; larger: a first start is silent for longer


@contextmanager
def loading(console: Console) -> Iterator[None]:
    """Show on a terminal that a bundle is loaded; say, there and elsewhere, when numba compiles for long meanwhile."""
    from numba.core.event import Event, Listener, install_listener

    status = console.status("loading the bundle")

    class Passes(Listener):  # type: ignore[misc]  # of numba's compiler: what is in its cache has none
        begin = 0.0

        def on_start(self, event: Event) -> None:
            self.begin = self.begin or time.monotonic()
            if time.monotonic() - self.begin > PATIENCE:
                status.update(COMPILING)
                _say_once(console)

        def on_end(self, event: Event) -> None: ...

    with install_listener("numba:run_pass", Passes()), status:
        yield


@cache
def _say_once(console: Console) -> None:
    if not console.is_terminal:  # which has the status
        console.print(COMPILING, soft_wrap=True)


class BuildProgress:
    """``stage`` begins a stage; ``detail`` says which share of it is done, from 0 to 1, and in which phase it is."""

    def __init__(self, console: Console):
        self._console = console
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[phase]}")
        self._bars = Progress(
            *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = None
        self._interrupted = False

    def __enter__(self) -> BuildProgress:
        self._bars.start()
        numbers = (signal.SIGINT, *stop_signals())
        self._before = {number: signal.signal(number, self._interrupt) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._bars.stop()

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def stage(self, stage: str) -> None:
        if self._interrupted:  # raised where a compiler's callback has dropped it
            raise KeyboardInterrupt
        if not self._console.is_terminal:
            self._console.print(stage)
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(stage, total=None, phase="")

    def detail(self, share: float, phase: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, total=1.0, completed=share, phase=phase)
