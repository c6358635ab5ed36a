"""The calibration on disk: ``calibration.json`` belongs to a target and its draft, ``costs.json`` to a machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from echo_trt.bundle import MANIFEST, Manifest, read_manifest
from echo_trt.decoding.goodput.acceptance import CALIBRATED, KNOTS, Acceptance
from echo_trt.decoding.goodput.costs import FAR, NEAR, Costs, Curve
from echo_trt.errors import UserError, first_mistake
from echo_trt.inputs import read_text
from echo_trt.recipe import Positive, Probability

CALIBRATION, COSTS = "calibration.json", "costs.json"

Count = Annotated[int, Field(ge=0)]
#: What a pass, or a part of one, takes.
Seconds = Annotated[float, Field(ge=0, le=600)]
#: What a cached token adds to it.
SecondsEach = Annotated[float, Field(ge=0, le=1)]
#: Of a pass; curves are drawn token by token.
Tokens = Annotated[int, Field(ge=1, le=2**16)]
#: To which engines fill passes up.
Granule = Annotated[int, Field(ge=1, le=64)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=_Stored)


class Gate(_Stored):
    """A depth: how well confidence tells acceptance there (AUC over ``samples``), and the best threshold."""

    depth: Positive
    auc: Probability
    samples: Count
    accepted: Probability
    threshold: Probability
    sweet_spot: bool


class Calibration(_Stored):
    """``acceptance``: source -> depth by depth, P(accept) at ``echo_trt.decoding.goodput.acceptance.knots()``.

    ``children`` [depth][child][quantile]; ``fixed_threshold`` is the best single one for all gates.
    """

    format: Literal[1] = 1
    target_sha256: str
    draft_sha256: str
    positions: Count
    gates: list[Gate]
    fixed_threshold: Probability
    acceptance: dict[str, list[list[Probability]]]
    children: list[list[list[Probability]]]
    lookup: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        description="P(a copied token is accepted) after a match of 1, 2, ... tokens"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Calibration:
        depths = len(self.children)
        if set(self.acceptance) != set(CALIBRATED):
            raise ValueError(f"acceptance must have the sources {', '.join(CALIBRATED)}")
        if not depths or any(len(rows) != depths for rows in self.acceptance.values()):
            raise ValueError("acceptance and children must have as many depths, one or more")
        if any(len(row) != KNOTS for rows in self.acceptance.values() for row in rows):
            raise ValueError(f"acceptance must hold {KNOTS} values a depth")
        shapes = {(len(depth), *map(len, depth)) for depth in self.children}
        if len(shapes) != 1 or 0 in next(iter(shapes)) or len(set(next(iter(shapes))[1:])) != 1:
            raise ValueError("children must hold as many quantiles for each depth and child")
        if not self.lookup:
            raise ValueError("lookup must hold a probability or more")
        return self

    def model(self) -> Acceptance:
        table = np.array([self.acceptance[source] for source in CALIBRATED], np.float64)
        return Acceptance(table, np.array(self.children, np.float64))

    @property
    def sweet_spots(self) -> dict[int, float]:
        """The sparse gates: depth -> threshold."""
        return {g.depth: g.threshold for g in self.gates if g.sweet_spot}


class CurveTable(_Stored):
    """Seconds of a pass over each of ``sizes`` tokens, and what a cached token adds, to it and for each node.

    0 seconds are those of a network that is not there.
    """

    sizes: list[Tokens]
    seconds: list[Seconds]
    per_context: SecondsEach = 0.0
    per_node: SecondsEach = 0.0

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

    def curve(self, reach: float, together: bool = False) -> Curve:
        return Curve(self.sizes, self.seconds, self.per_context, self.per_node, reach, together)


class HingeTable(_Stored):
    """``echo_trt.decoding.goodput.costs.Hinge``."""

    t_ar: Annotated[float, Field(gt=0)]
    gamma: float
    k_max: Tokens
    error: Annotated[float, Field(ge=0)]


class CostTable(_Stored):
    """Measured on ``machine``; ``hinge`` is the paper's model of the target's curve."""

    format: Literal[1] = 1
    machine: str
    measured: date
    target: CurveTable
    draft: CurveTable
    hinge: HingeTable
    cold: Seconds = 0.0
    granule: Granule = 1
    change: Seconds = 0.0
    least: Granule = 1

    @model_validator(mode="after")
    def _is_of_a_target(self) -> CostTable:
        if self.target.seconds[0] == 0:
            raise ValueError("target.seconds must be above 0")
        if self.hinge.k_max > self.target.sizes[-1]:
            raise ValueError(f"hinge.k_max is {self.hinge.k_max}, beyond the largest of target.sizes")
        return self

    def costs(self) -> Costs:
        target = self.target.curve(NEAR, together=True)
        return Costs(target, self.draft.curve(FAR), self.cold, self.granule, self.change, self.least)


def machine(manifest: Manifest) -> str:
    """What must be the same for measured times to hold."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = manifest.tools.get(manifest.engine, "")
    return f"{_processor()}, {cores} cores, {manifest.engine} {versions} {manifest.computes_in}".replace("  ", " ")


def own_files(bundle: Path) -> list[Path]:
    """What a bundle holds and is read from it: nothing that another file may take the place of."""
    return [bundle / name for name in (MANIFEST, *read_manifest(bundle).files, CALIBRATION, COSTS)]


def read_calibration(path: Path, target_sha256: str, draft_sha256: str) -> Calibration:
    """A calibration for this target and draft; one of others is refused."""
    stored = read_stored(path, Calibration, "run echo-trt calibrate again")
    for what, mine, its in (
        ("target", target_sha256, stored.target_sha256),
        ("draft", draft_sha256, stored.draft_sha256),
    ):
        if mine != its:
            raise UserError(
                f"{path} was made for another {what} (hash {its[:12] or 'none'}, this one's is {mine[:12] or 'none'}); "
                "run echo-trt calibrate on a bundle of this pair."
            )
    return stored


def read_costs(folder: Path, manifest: Manifest, note: Callable[[str], None]) -> CostTable | None:
    """Costs of this bundle measured on a machine like this one, or None; ``note`` is told of a file that is damaged."""
    path = folder / COSTS
    if not path.exists():
        return None
    try:
        table = read_stored(path, CostTable, "it is measured again")
    except UserError as error:  # a start needs nobody's help to make another
        note(str(error))
        return None
    whole = manifest.draft is None or table.draft.seconds[0] > 0
    return table if whole and table.machine == machine(manifest) else None


def write(folder: Path, name: str, stored: _Stored) -> None:
    """The file appears whole or not at all, also where two processes write it."""
    partial = folder / f".{name}.{os.urandom(4).hex()}.partial"
    try:
        partial.write_text(stored.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / name)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read_stored(path: Path, model: type[Model], remedy: str) -> Model:
    try:
        return model.model_validate_json(read_text(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; {remedy}.") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; {remedy}.") from error


def _processor() -> str:
    """Its name and, since virtual machines shorten names, its family and model where they are told."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {told[key]}" for key in ("cpu family", "model") if key in told]
    return f"{name} ({', '.join(numbers)})" if numbers else name
