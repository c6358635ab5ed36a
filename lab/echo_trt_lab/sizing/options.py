"""The options of ``echo-trt inspect``."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from echo_trt.cli.options import EngineOption, NumberType
from echo_trt.engine.options import bounds


@dataclass(frozen=True)
class InspectOptions:
    """What ``inspect`` is asked to do."""

    path: Annotated[
        str,
        Parameter(help="A bundle folder, or what build takes: a recipe, its name, a model.", metavar="BUNDLE|MODEL"),
    ]
    _: KW_ONLY
    cards: Annotated[
        str | None,
        Parameter("--fit", metavar="CARDS", help='Does a recipe fit these, "H100-80GB x8"? Exit code 1: no.'),
    ] = None
    engine: Annotated[EngineOption | None, Parameter(help="Built for this runtime instead of the recipe's.")] = None
    precision: Annotated[NumberType | None, Parameter(help="Built in this precision instead of the recipe's.")] = None
    max_model_len: Annotated[int | None, Parameter(help="limits.context.", validator=bounds(16))] = None
    max_num_seqs: Annotated[int | None, Parameter(help="limits.batch.", validator=bounds(1))] = None
