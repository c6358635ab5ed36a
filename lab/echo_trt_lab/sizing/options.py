"""The options of ``echo-trt inspect``."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


@dataclass(frozen=True)
class InspectOptions:
    """What ``inspect`` is asked to do."""

    path: Annotated[
        Path, Parameter(help="A bundle folder, a recipe, or a shipped one's name.", metavar="BUNDLE|RECIPE")
    ]
    _: KW_ONLY
    cards: Annotated[
        str | None,
        Parameter("--fit", metavar="CARDS", help='Does a recipe fit these, "H100-80GB x8"? Exit code 1: no.'),
    ] = None
