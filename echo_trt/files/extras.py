"""What another package, echo_trt_lab, adds to commands: found by entry points, since this package imports no other."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from echo_trt.errors import UserError


def extra(command: str, name: str) -> Any:
    """Load what is named so for a command. Raises UserError where an older version was installed."""
    for entry in entry_points(group=f"echo_trt.{command}", name=name):
        return entry.load()
    raise UserError(f"{command} has no {name}, since an older version is installed; install echo-trt again.")


def extras(what: str) -> list[Any]:
    """Load all that installed packages add to ``what``, such as wrappers of a bundle's networks."""
    return [entry.load() for entry in entry_points(group=f"echo_trt.{what}")]
