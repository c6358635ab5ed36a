"""``costs.json``: the seconds of passes on this machine, measured once and kept beside the bundle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from echo_trt.bundle.manifest import Manifest
from echo_trt.bundle.stored import _Stored, read_stored
from echo_trt.errors import UserError
from echo_trt.speculation.goodput.model.costs import Costs, Curve

COSTS = "costs.json"
Seconds = Annotated[float, Field(ge=0, le=600)]  # of a pass, or of a part of one
SecondsPerToken = Annotated[float, Field(ge=0, le=1)]  # that a cached token adds to a pass
TokenCount = Annotated[int, Field(ge=1, le=2**16)]  # of a pass; a curve has an entry per token: larger takes memory


class CurveTable(_Stored):
    """Holds the measured seconds of a network's passes.

    sizes        [m], tokens of a pass, ascending from 1
    seconds      [m], seconds of a pass of that size; 0: there is no such network
    per_context  seconds that a cached token adds to a pass
    per_node     seconds that a cached token adds for each tree node that attends it
    """

    sizes: list[TokenCount]
    seconds: list[Seconds]
    per_context: SecondsPerToken = 0.0
    per_node: SecondsPerToken = 0.0

    @model_validator(mode="after")
    def _is_a_curve(self) -> CurveTable:
        ascending = all(a < b for a, b in itertools.pairwise(self.sizes))
        if not self.sizes or self.sizes[0] != 1 or not ascending or len(self.sizes) != len(self.seconds):
            raise ValueError("sizes must ascend from 1, with seconds for each")
        if any(a > b for a, b in itertools.pairwise(self.seconds)):
            raise ValueError("seconds must not descend")
        if self.seconds[0] == 0 < self.seconds[-1]:
            raise ValueError("seconds must be above 0")
        return self

    def curve(self) -> Curve:
        return Curve(self.sizes, self.seconds, self.per_context, self.per_node)


class HingeTable(_Stored):
    """A fitted ``echo_trt.speculation.echo.budget.Hinge``, validated."""

    t_ar: Annotated[float, Field(gt=0)]
    gamma: float
    k_max: TokenCount
    error: Annotated[float, Field(ge=0)]


class CostTable(_Stored):
    """Holds the costs that were measured on ``machine``.

    hinge   the paper's model of the target's curve
    cold    extra seconds of a draft's first pass after a target's
    change  extra seconds of a target's pass that has another size than the last one
    sizes   [m], tokens, ascending: the padded sizes of the target's passes (``Engine.sizes``)
    """

    format: Literal[1] = 1
    machine: str
    measured: date
    target: CurveTable
    draft: CurveTable
    hinge: HingeTable
    cold: Seconds = 0.0
    change: Seconds = 0.0
    sizes: tuple[TokenCount, ...] = ()

    @model_validator(mode="after")
    def _is_of_a_target(self) -> CostTable:
        if self.target.seconds[0] == 0:
            raise ValueError("target.seconds must be above 0")
        if any(a >= b for a, b in itertools.pairwise(self.sizes)):
            raise ValueError("sizes must ascend")
        if self.hinge.k_max > self.target.sizes[-1]:
            raise ValueError(f"hinge.k_max is {self.hinge.k_max}, beyond the largest of target.sizes")
        return self

    def costs(self) -> Costs:
        return Costs(self.target.curve(), self.draft.curve(), self.cold, self.change, self.sizes)


def read_costs(path: Path, manifest: Manifest, machine: str, note: Callable[[str], None]) -> CostTable | None:
    """Read the costs of a bundle on a machine like this one, or None. ``note`` takes the fault of a damaged file."""
    if not path.is_file():
        return None
    try:
        table = read_stored(path, CostTable, "it is measured again")
    except UserError as error:  # the runtime measures again by itself
        note(str(error))
        return None
    whole = manifest.draft is None or table.draft.seconds[0] > 0
    return table if whole and table.machine == machine else None
