"""Options of the gateway that ``echo-trt serve`` has too, so that it refuses what the gateway would."""

from __future__ import annotations

import re
from collections.abc import Sequence

from echo_trt.errors import UserError

LONGEST = 256  # characters of a name
_ORIGIN = re.compile(r"\*|https?://[^/\s@?#,]+")


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the model, without those given twice. Raises UserError."""
    for name in names:
        if not name or len(name) > LONGEST or not name.isprintable() or " " in name:
            raise UserError(
                f"--served-model-name is {name[:LONGEST]!a}; give 1 to {LONGEST} characters that can be printed, "
                "without blanks."
            )
    return tuple(dict.fromkeys(names))


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Of web pages that may ask. Raises UserError."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UserError(
                f"--allowed-origins is {origin[:LONGEST]!a}; give a scheme and a host, such as https://example.com, or "
                "* for all."
            )
    return tuple(origins)
