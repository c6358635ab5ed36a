"""Latency targets as requests and options write them, and the named classes of a server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from echo_trt.errors import UserError, shown

SMALLEST, LARGEST = 0.001, 86_400_000  # milliseconds of a target: what no machine keeps, and a day
TARGETS = ("ttft_ms", "tpot_ms")
RULE = f"an object of ttft_ms and tpot_ms, or of one of them: milliseconds from {SMALLEST} to {LARGEST:,}"
CLASSES = "write NAME=TTFT_MS/TPOT_MS by commas, such as interactive=300/25,batch; a target may be left out."


def checked(latency: Mapping[str, Any]) -> None:
    """Refuse what is no target. Raises UserError."""
    targets = {name: value for name, value in latency.items() if name != "class"}
    for name, value in targets.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and SMALLEST <= value <= LARGEST
        if name not in TARGETS or not number:
            raise UserError(f"latency has {shown(str(name))}: {shown(value)}; give {RULE}.", "latency")


class LatencyClasses:
    """Targets by the names that requests and API keys may give."""

    def __init__(self, text: str = ""):
        """Read an option's text. Raises UserError."""
        self._classes: dict[str, dict[str, Any]] = {}
        for entry in filter(None, text.split(",")):
            name, _, values = entry.partition("=")
            targets: dict[str, Any] = {"class": name}
            try:
                given = zip(TARGETS, values.split("/"), strict=False)
                targets |= {target: float(value) for target, value in given if value}
                checked(targets)
            except (ValueError, UserError):
                values = "/".join(("", "", ""))
            if not name.isidentifier() or len(name) > 64 or values.count("/") > 1 or name in self._classes:
                raise UserError(f"--latency-classes has {shown(entry)}; {CLASSES}")
            self._classes[name] = targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def read(self, text: str) -> dict[str, Any] | None:
        """Return the targets of a class's name or of a JSON object; None: there are none. Raises UserError."""
        if not text:
            return None
        if text in self._classes:
            return self._classes[text]
        try:
            targets = json.loads(text)
        except (ValueError, RecursionError):
            targets = None
        if not isinstance(targets, dict) or "class" in targets:
            known = f", or one of the classes {', '.join(self._classes)}" if self._classes else ""
            raise UserError(f"latency is {shown(text)}; give {RULE}{known}.", "latency")
        checked(targets)
        return targets or None
