"""How far a build is, on a terminal: its stage and, where the compiler says so, a bar. Elsewhere one line per stage."""

from __future__ import annotations

import signal

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from echo_trt.supervision.stopping import stop_signals


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
