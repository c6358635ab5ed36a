"""How far predicted acceptance is from what was accepted, on requests that were not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.calibration.fit import acceptance_table, lookup_acceptance
from echo_trt.calibration.observe import Observed, observe
from echo_trt.calibration.trees import Trees
from echo_trt.decoding.echo.settings import EchoSettings
from echo_trt.decoding.goodput.acceptance import Acceptance

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """By bins of predicted probability: mean prediction and share accepted, on trees that were not fitted on.

    ``error`` is the expected calibration error: their distance, averaged over nodes that were given 5 % or more; the
    many below that hardly ever matter, and would hide it.
    """

    predicted: np.ndarray
    accepted: np.ndarray
    error: float


def reliability(trees: Trees, shape: EchoSettings) -> tuple[Reliability, Reliability]:
    """The draft's own path probability, and the calibrated one fitted on the other half of the requests."""
    lookup = lookup_acceptance(trees)
    observed = observe(trees, lookup, shape.max_depth, shape.beams, shape.width)
    odd = trees.request[observed.tree] % 2 == 1
    table = acceptance_table(_part(observed, ~odd), shape.max_depth)
    check = _part(observed, odd)
    fitted = Acceptance(table, np.zeros((shape.max_depth, 1, 1))).probability(check.source, check.depth, check.score)
    return _diagram(np.exp(check.score), check.accepted), _diagram(fitted, check.accepted)


def _part(observed: Observed, chosen: np.ndarray) -> Observed:
    return Observed(*(getattr(observed, name)[chosen] for name in Observed.__dataclass_fields__))


def _diagram(predicted: np.ndarray, accepted: np.ndarray) -> Reliability:
    worth = predicted >= 0.05
    predicted, accepted = predicted[worth], accepted[worth]
    cell = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(cell, minlength=BINS)
    filled = count > 0
    mean = np.bincount(cell, predicted, BINS)[filled] / count[filled]
    share = np.bincount(cell, accepted, BINS)[filled] / count[filled]
    return Reliability(mean, share, float((abs(mean - share) * count[filled]).sum() / max(count.sum(), 1)))
