"""What another package, echo_trt_lab, adds to commands: found by entry points, since this package imports no other."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any


def extra(command: str, name: str) -> Any:
    """Load what is named so for a command."""
    (entry,) = entry_points(group=f"echo_trt.{command}", name=name)
    return entry.load()
