"""What packages add: the lab to commands, backends as engines. Found by entry points, so that nothing names them.

And what the extra "build" adds: the modules that compile a checkpoint.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from echo_trt.errors import UserError

BUILD = ("gguf", "nncf", "onnx", "onnxscript", "yaml")  # modules of the extra "build"


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


def of_lab(command: str, name: str) -> Any:
    """Load what the lab adds to a command. Raises UserError where it is not installed."""
    if name not in registered(command):
        words = name.replace("_", " ")
        raise UserError(f"{command} has no {words} without echo-trt-lab; run pip install ./lab in the repository.")
    return extra(command, name)


def check_build() -> None:
    """Refuse to build where a module that compiling needs is missing."""
    if missing := ", ".join(name for name in BUILD if find_spec(name) is None):
        raise UserError(f"a build needs {missing}, not installed here; run pip install 'echo-trt[build]'.")


def extras(what: str) -> list[Any]:
    """Load all that installed packages add to ``what``, such as wrappers of a bundle's networks."""
    return [entry.load() for entry in entry_points(group=f"echo_trt.{what}")]
