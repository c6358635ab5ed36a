"""Reads ``calibration.json``, which belongs to a target and its draft; ``costs.json`` belongs to a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from echo_trt.bundle.costs import COSTS
from echo_trt.bundle.manifest import MANIFEST, read_manifest
from echo_trt.bundle.recipe import Positive, Probability
from echo_trt.bundle.stored import CALIBRATION, Count, _Stored, read_stored
from echo_trt.errors import UserError
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED, KNOTS, Acceptance


class Gate(_Stored):
    """The gate of a depth: AUC of the draft's confidence over ``samples`` trees, and the best threshold."""

    depth: Positive
    auc: Probability
    samples: Count
    accepted: Probability
    threshold: Probability
    sweet_spot: bool


class Calibration(_Stored):
    """Holds the acceptance rates and gates that were fitted to a target and its draft.

    acceptance       source -> [depth][knot], P(accept) at ``echo_trt.speculation.goodput.model.acceptance.knots()``
    children         [depth][child][quantile], a child's worth as a share of its parent's
    fixed_threshold  the best single threshold for all gates
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
            raise ValueError("acceptance and children must have the same number of depths, one or more")
        if any(len(row) != KNOTS for rows in self.acceptance.values() for row in rows):
            raise ValueError(f"acceptance must hold {KNOTS} values a depth")
        shapes = {(len(depth), *map(len, depth)) for depth in self.children}
        if len(shapes) != 1 or 0 in next(iter(shapes)) or len(set(next(iter(shapes))[1:])) != 1:
            raise ValueError("children must hold the same number of quantiles for each depth and child")
        if not self.lookup:
            raise ValueError("lookup must hold a probability or more")
        return self

    def model(self) -> Acceptance:
        table = np.array([self.acceptance[source] for source in CALIBRATED], np.float64)
        return Acceptance(table, np.array(self.children, np.float64))

    @property
    def sparse_gates(self) -> dict[int, float]:
        """The sparse gates: depth -> threshold."""
        return {g.depth: g.threshold for g in self.gates if g.sweet_spot}


def own_files(bundle: Path) -> list[Path]:
    """Return the files that are read from a bundle: a command must not write another file over one of them."""
    return [bundle / name for name in (MANIFEST, *read_manifest(bundle).files, CALIBRATION, COSTS)]


def read_calibration(path: Path, target_sha256: str, draft_sha256: str) -> Calibration:
    """Read a calibration and refuse one of another target or draft."""
    stored = read_stored(path, Calibration, "run echo-trt calibrate again")
    hashes = {"target": (target_sha256, stored.target_sha256), "draft": (draft_sha256, stored.draft_sha256)}
    for network, (wanted, stated) in hashes.items():
        if wanted != stated:
            raise UserError(
                f"{path} was made for another {network} (hash {stated[:12] or 'none'}, this one's is "
                f"{wanted[:12] or 'none'}); run echo-trt calibrate on a bundle of this pair."
            )
    return stored
