"""What packages add: the lab to commands, backends as engines. Found by entry points, so that nothing names them.

And the modules that extras of ours add: a command without them says which extra brings them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from echo_trt.errors import UserError

#: The groups of engines (``backends.kind``) and drafters (``engine.drafters.kind``).
ENGINES, DRAFTS = "engines", "drafts"
BUILD = ("gguf", "onnx", "onnxscript", "yaml")  # modules of the extra "build", beside PyTorch's
LAB = ("bench", "calibrate", "inspect", "simulate")  # commands of echo-trt-lab
CHECKOUT = Path(__file__).parents[2] / "pyproject.toml"


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    """Return what is installed, and what a checkout has itself: its environment may hold an older version, or none."""
    known = {entry.name: entry for entry in entry_points(group=f"echo_trt.{group}")}
    if CHECKOUT.exists():
        own = tomllib.loads(CHECKOUT.read_text("utf-8"))["project"].get("entry-points", {}).get(f"echo_trt.{group}", {})
        known |= {name: EntryPoint(name, at, group) for name, at in own.items() if at.startswith("echo_trt.")}
    return known


def registered(group: str) -> tuple[str, ...]:
    """Return the names of the entry points ``echo_trt.GROUP``, in order."""
    return tuple(sorted(_entry_points(group)))


@cache
def extra(command: str, name: str) -> Any:
    """Load what is named so for a command. Raises UserError where an older version was installed."""
    if entry := _entry_points(command).get(name):
        return entry.load()
    raise UserError(f"{command} has no {name}, since an older version is installed; install echo-trt again.")


def check_lab(command: str) -> None:
    """Refuse a command of the lab where it is not installed."""
    if command in LAB and command not in registered("commands"):
        raise UserError(f"{command} is a command of echo-trt-lab; run pip install ./lab in the repository.")


def of_lab(command: str, name: str) -> Any:
    """Load what the lab adds to a command. Raises UserError where it is not installed."""
    if name not in registered(command):
        words = name.replace("_", " ")
        raise UserError(f"{command} has no {words} without echo-trt-lab; run pip install ./lab in the repository.")
    return extra(command, name)


def check_modules(what: str, modules: Iterable[str], extra: str) -> None:
    """Refuse ``what`` where a module that it needs is missing; ``extra``: which brings it."""
    if missing := ", ".join(name for name in modules if find_spec(name) is None):
        raise UserError(f"{what} needs {missing}, not installed here; run pip install 'echo-trt[{extra}]'.")
