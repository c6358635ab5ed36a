"""What ``echo-trt worker`` was asked to do."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """None stands for the recipe's own; ``name`` is what clients call the model.

    system_port    of metrics and health; 0: none
    drain_seconds  that open answers have to finish once the worker is told to stop
    """

    bundle: Path
    name: str
    policy: str | None = None
    batch: int | None = None
    queue: int = 256
    drain_seconds: float = 60.0
    system_port: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None

    def stop(self) -> None:
        """End the worker as SIGTERM does."""
        os.kill(os.getpid(), signal.SIGTERM)
