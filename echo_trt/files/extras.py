"""What packages add: the lab to commands, backends as engines. Found by entry points, so that nothing names them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from echo_trt.errors import UserError


@cache
def registered(group: str) -> tuple[str, ...]:
    """Return the names of the entry points ``echo_trt.GROUP``, in order."""
    return tuple(sorted(entry_points(group=f"echo_trt.{group}").names))


@cache
def extra(command: str, name: str) -> Any:
    """Load what is named so for a command. Raises UserError where an older version was installed."""
    for entry in entry_points(group=f"echo_trt.{command}", name=name):
        return entry.load()
    raise UserError(f"{command} has no {name}, since an older version is installed; install echo-trt again.")
